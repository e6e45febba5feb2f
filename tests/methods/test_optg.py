"""OptG against an independent reference in autograd, its schedule by hand, and its limits."""

import copy
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


def largest(S, count):
    """Masks of the largest of all scores, the earlier one among equals."""
    values = [v for s in S.values() for v in s.detach().flatten().tolist()]
    flat = torch.zeros(len(values), dtype=torch.float64)
    flat[sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]] = 1
    parts = flat.split([s.numel() for s in S.values()])
    return {n: m.view_as(s) for (n, s), m in zip(S.items(), parts, strict=True)}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def reference(net, make, sparsity, k, accumulate, epochs, end):
    """Scores are trained by plain SGD, with the learning rate that the optimizer of the weights has by a schedule."""
    W = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if p.ndim > 1}
    S = {name: torch.zeros_like(w, requires_grad=True) for name, w in W.items()}
    rest = {name: p for name, p in net.named_parameters() if p.ndim == 1}
    masks = {name: torch.ones_like(w) for name, w in W.items()}
    size = sum(w.numel() for w in W.values())
    optimizer = make([*W.values(), *rest.values()])
    x, y = data(240, torch.float64)
    done = 0
    for _ in range(epochs):
        for i in range(30):
            batch = slice(8 * i, 8 * i + 8)
            u = min(done / end, 1)
            P = {n: Supermask.apply(w, S[n], masks[n], curve(u, k)) for n, w in W.items()}
            loss = torch.nn.functional.cross_entropy(functional_call(net, {**rest, **P}, x[batch]), y[batch])
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i < 29:
                continue
            optimizer.step()
            for score in S.values():
                score.data -= optimizer.param_groups[0]["lr"] * score.grad
                score.grad = None
            optimizer.zero_grad()
            done += 1
            ends = curve(0, k), curve(1, k)
            share = (curve(min(done / end, 1), k) - ends[0]) / (ends[1] - ends[0])
            masks = largest(S, size - round(round(sparsity * size) * share))
        optimizer.param_groups[0]["lr"] *= 0.5
    return W, S, masks, rest


@pytest.mark.parametrize(("net", "accumulate", "make"), [(mlp, 1, sgd), (cnn, 4, adamw)])
def test_trains_as_the_autograd_reference(net, accumulate, make):
    """Neither momentum, weight decay nor Adam's normalisation touches the scores; a schedule does."""
    epochs = 2 if accumulate == 1 else 4
    end = math.ceil(0.6 * epochs * math.ceil(30 / accumulate))
    W, S, masks, rest = reference(seeded(lambda: net(torch.float64)), make, 0.7, 10.0, accumulate, epochs, end)
    callback = OptG(0.7, update_every=1)
    module = Lit(seeded(lambda: net(torch.float64)), make, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate).fit(module, loader(dtype=torch.float64))
    for name, w in W.items():
        pairs = (callback.latents[f"net.{name}"], w), (callback.criteria[f"net.{name}"], S[name])
        for ours, theirs in pairs:
            assert (ours - theirs.detach()).abs().max() <= 1e-5 * theirs.detach().abs().max()
        assert torch.equal(callback.masks[f"net.{name}"], masks[name] != 0)
    for name, p in rest.items():
        assert torch.allclose(module.net.get_parameter(name), p, rtol=1e-5, atol=1e-8)
    assert 0.69 < callback.sparsity < 0.71


def test_scores_learn_at_the_rate_of_their_weight_and_stay_out_of_the_optimizer():
    def grouped(parameters):
        first, *others = parameters
        return torch.optim.Adam([{"params": [first], "lr": 0.0}, {"params": others}], lr=0.01)

    callback = OptG(0.5)
    module, run = fit(callback, seeded(lambda: Lit(optimizer=grouped)))
    S = callback.criteria
    assert not S["net.0.weight"].any(), "its learning rate is 0"
    assert S["net.2.weight"].any()
    parameters = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in module.parameters()}
    assert len(run.optimizers[0].state) == len(parameters) == 6


def test_scores_grow_the_other_way_where_the_loss_is_maximized():
    found = []
    for sign in (1, -1):

        class Signed(Lit):
            def training_step(self, batch, batch_idx, sign=sign):
                return sign * super().training_step(batch, batch_idx)

        callback = OptG(0.5)
        fit(callback, seeded(lambda: Signed(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, maximize=sign < 0))))  # noqa: B023
        found.append(callback.criteria)
    assert all(torch.equal(found[0][name], S) for name, S in found[1].items())


def test_gradients_that_are_not_finite_leave_the_scores_finite():
    class Explodes(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 5 else 1.0)

    callback = OptG(0.5)
    fit(callback, seeded(Explodes), max_epochs=1)
    assert all(S.isfinite().all() for S in callback.criteria.values())


def test_by_default_the_target_is_met_while_there_is_training_left():
    """At 60 % of the training; at its end, the learning rates of most schedules are gone."""
    callback = OptG(0.9)
    counts = []

    class Looks(Lit):
        def on_train_batch_end(self, *args):
            counts.append(sum(int(m.sum()) for m in callback.masks.values()))

    fit(callback, seeded(Looks))
    assert min(range(60), key=lambda step: (counts[step] != 39, step)) == 35
    assert set(counts[35:]) == {39}


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

    callback = OptG(0.8, end_at=0.3, scope="layer", update_every=1)
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


def test_the_state_of_an_earlier_version_is_refused_with_what_to_do():
    callback = OptG(0.8)
    fit(callback, max_epochs=2)
    state = copy.deepcopy(callback.state_dict())
    for kept in state["weights"].values():
        del kept["buffers"]["S"]
    with pytest.raises(MisconfigurationException, match=r"earlier version of \w+, .*load_from_checkpoint\(path\)"):
        OptG(0.8).load_state_dict(state)
