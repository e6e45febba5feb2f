"""OptG against an independent reference in autograd, its schedule by hand, and its limits."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import Lit, cnn, data, effective, fit, loader, mlp, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.func import functional_call

from lightning_sparse import OptG


class Supermask(torch.autograd.Function):
    """``W * mask``; the scores get the mask's gradient times a rate, straight through the selection."""

    @staticmethod
    def forward(ctx, W, S, mask, rate):
        ctx.save_for_backward(W, mask)
        ctx.rate = rate
        return W * mask

    @staticmethod
    def backward(ctx, grad):
        W, mask = ctx.saved_tensors
        return grad * mask, ctx.rate * (grad * W), None, None


def curve(u, k):
    return 1 / (1 + math.exp(-k * (u - 0.5)))


def reference(net, sparsity, k, accumulate, epochs, steps):
    W = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if p.ndim > 1}
    S = {name: torch.zeros_like(w, requires_grad=True) for name, w in W.items()}
    rest = {name: p for name, p in net.named_parameters() if p.ndim == 1}
    masks = {name: torch.ones_like(w) for name, w in W.items()}
    sizes = [w.numel() for w in W.values()]
    optimizer = torch.optim.SGD([*W.values(), *rest.values(), *S.values()], lr=0.1, momentum=0.9, weight_decay=1e-3)
    x, y = data(240, torch.float64)
    done = 0
    for _ in range(epochs):
        optimizer.zero_grad()
        for i in range(30):
            batch = slice(8 * i, 8 * i + 8)
            P = {n: Supermask.apply(w, S[n], masks[n], curve(done / steps, k)) for n, w in W.items()}
            loss = torch.nn.functional.cross_entropy(functional_call(net, {**rest, **P}, x[batch]), y[batch])
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i < 29:
                continue
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            ends = curve(0, k), curve(1, k)
            share = (curve(done / steps, k) - ends[0]) / (ends[1] - ends[0])
            count = sum(sizes) - round(round(sparsity * sum(sizes)) * share)
            values = [v for s in S.values() for v in s.detach().flatten().tolist()]
            flat = torch.zeros(len(values), dtype=torch.float64)
            flat[sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]] = 1
            masks = {n: m.view_as(w) for (n, w), m in zip(W.items(), flat.split(sizes), strict=True)}
    return W, S, masks, rest


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("net", [mlp, cnn])
def test_trains_as_the_autograd_reference(net, accumulate):
    epochs = 2 * accumulate
    steps = epochs * math.ceil(30 / accumulate)
    W, S, masks, rest = reference(seeded(lambda: net(torch.float64)), 0.7, 10.0, accumulate, epochs, steps)
    callback = OptG(0.7)
    module = Lit(seeded(lambda: net(torch.float64)))
    trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate).fit(module, loader(dtype=torch.float64))
    for name, w in W.items():
        pairs = (callback.latents[f"net.{name}"], w), (callback.criteria[f"net.{name}"], S[name])
        for ours, theirs in pairs:
            assert (ours - theirs.detach()).abs().max() <= 1e-5 * theirs.detach().abs().max()
        assert torch.equal(callback.masks[f"net.{name}"], masks[name] != 0)
    for name, p in rest.items():
        assert torch.allclose(module.net.get_parameter(name), p, rtol=1e-5, atol=1e-8)
    assert 0.69 < callback.sparsity < 0.71


def test_without_sparsity_it_is_dense_training_to_the_last_bit():
    callback = OptG(0.0)
    module, _ = fit(callback, seeded(lambda: Lit(cnn())))
    dense, _ = fit([], seeded(lambda: Lit(cnn())))
    assert callback.density == 1
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("end_at", [1.0, 0.5])
def test_the_number_of_weights_falls_along_the_curve_to_the_target_exactly(end_at, scope):
    callback = OptG(0.9, steepness=8, end_at=end_at, scope=scope, update_every=4)
    counts = []

    class Looks(Lit):
        def on_train_batch_end(self, *args):
            counts.append(sum(int(m.sum()) for m in callback.masks.values()))

    module, _ = fit(callback, seeded(Looks))
    end = round(60 * end_at)
    removed = round(0.9 * 392)
    for step, count in enumerate(counts, 1):
        last = end if step >= end else step - step % 4
        share = (curve(last / end, 8) - curve(0, 8)) / (curve(1, 8) - curve(0, 8))
        assert count == 392 - round(removed * share)
    assert counts[0] == 392
    assert counts[end - 1] == counts[-1] == 392 - removed
    assert effective(module, callback)


def test_removed_weights_keep_their_values_and_can_come_back():
    """Without weight decay a removed weight stays what it was, while its score goes on."""
    seen = []

    class Looks(Lit):
        def on_train_batch_end(self, *args):
            seen.append({n: (m.clone(), callback.latents[n].clone()) for n, m in callback.masks.items()})

    callback = OptG(0.8, end_at=0.3, scope="layer")
    fit(callback, seeded(lambda: Looks(optimizer=lambda p: torch.optim.SGD(p, lr=0.3))))
    back = 0
    for before, now in pairwise(seen):
        for name, (mask, W) in before.items():
            assert torch.equal(now[name][1][~mask], W[~mask])
            back += int((now[name][0] & ~mask).sum())
    assert back > 0


def test_another_fit_keeps_the_sparsity_that_was_reached():
    callback = OptG(0.8)
    module, _ = fit(callback)
    low = []

    class Looks(Lit):
        def on_train_batch_end(self, *args):
            low.append(callback.sparsity)

    again = seeded(Looks)
    again.load_state_dict(module.state_dict())
    fit(callback, again, max_epochs=3)
    assert set(low) == {1 - 78 / 392}


def test_a_training_without_end_is_refused():
    with pytest.raises(MisconfigurationException, match=r"OptG.* must know how long the training is"):
        fit(OptG(0.8), max_epochs=-1, max_time={"seconds": 20})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be below 1, got 1.0"),
        ({"steepness": -1}, "steepness must be a finite number above 0, got -1"),
        ({"steepness": 0}, "steepness must be a finite number above 0, got 0"),
        ({"end_at": 0.0}, "end_at must be above 0, got 0.0"),
        ({"end_at": 1.5}, "end_at must be a number from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        OptG(**{"sparsity": 0.8, **options})
