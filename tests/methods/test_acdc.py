"""ACDC: its phases, against a training loop of its own, and the two networks that it ends with."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import Lit, StopsAfter, cnn, data, fit, loader, mlp, saved, seeded, watched
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import ACDC
from lightning_sparse.rules.budgets import apportion, budget

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
}
OPTIONS = {"begin_at": 0.1, "last_dense": 0.2, "end_at": 0.8, "cycles": 2}
# of 20 steps: warm-up 0 to 1, sparse 2 to 4, dense 5 to 8, sparse 9 to 11, dense 12 to 15, sparse 16 to 19
BEGINS = (2, 5, 8, 12, 16)


def shown(value):
    """The numbers of connections after each of 20 steps."""
    dense = [step for step in range(20) if sum(begin <= step for begin in BEGINS) % 2 == 0]
    return [392 if step in dense else value for step in range(20)]


# ---------------------------------------------------------------------- phases


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_phases_have_exactly_all_weights_or_the_budget(scope):
    watch, _, _ = watched(ACDC(0.8, scope=scope, **OPTIONS), batches=20)
    assert watch.callback._alternation.phases.begins == BEGINS
    assert [sum(counts) for counts in watch.counts] == shown(78)
    if scope == "layer":
        assert watch.counts[-1] == apportion(78, [192, 160, 40], [192, 160, 40])


def test_the_paper_s_phases_are_shares_of_the_training():
    assert ACDC(0.5)._alternation.divided(200, 100).begins == (*(2 * epoch for epoch in range(10, 76, 5)), 170)


def test_a_short_training_has_fewer_phases_and_none_is_shorter_than_an_epoch():
    assert ACDC(0.5)._alternation.divided(50, 10).begins == (5, 11, 17, 24, 30, 37, 42)


def reference(optimizer, batches):
    """A plain loop that prunes, masks and restores by itself; the weights at the end, and before the last pruning."""
    net = seeded(mlp)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    weights = [layer.weight for layer in net if isinstance(layer, torch.nn.Linear)]
    masks = [torch.ones_like(W, dtype=torch.bool) for W in weights]
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        if step in BEGINS:
            masks, twin = begin_phase(optimizer, weights, masks, BEGINS.index(step) % 2 == 0), clone(net)
        for W, mask in zip(weights, masks, strict=True):
            W.grad *= mask
        optimizer.step()
        for W, mask in zip(weights, masks, strict=True):
            W.data *= mask
    return clone(net), twin


def clone(net):
    return {f"net.{name}": x.clone() for name, x in net.state_dict().items()}


def begin_phase(optimizer, weights, masks, sparse):
    if sparse:
        last = torch.cat([W.detach().abs().flatten() for W in weights]).sort(descending=True).values[77]
        masks = [W.detach().abs() >= last for W in weights]
        for W, mask in zip(weights, masks, strict=True):
            for state in optimizer.state[W].values():
                if isinstance(state, torch.Tensor) and state.ndim:
                    state *= mask
        return masks
    for state in optimizer.state.values():
        state.get("momentum_buffer", state.get("exp_avg")).zero_()
    for W, mask in zip(weights, masks, strict=True):
        scale = optimizer.state[W].get("exp_avg_sq")
        for row, active in enumerate(mask) if scale is not None else ():
            others = scale[row][active] if active.any() else scale[mask]
            scale[row][~active] = others.mean()
    return [torch.ones_like(mask) for mask in masks]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_networks_are_those_of_a_plain_loop(optimizer):
    callback, module = ACDC(0.8, **OPTIONS), seeded(lambda: Lit(optimizer=OPTIMIZERS[optimizer]))
    fit(callback, module, loader(160), max_epochs=1)
    sparse, _ = reference(optimizer, loader(160))
    for name, x in module.state_dict().items():
        assert torch.allclose(x, sparse[name], atol=1e-6), name
        assert torch.equal(x == 0, sparse[name] == 0), name


# ---------------------------------------------------------------------- the dense network


class Before(pl.Callback):
    """What the module is when a step begins."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.state = {name: x.clone() for name, x in module.state_dict().items()}


def test_the_dense_network_is_the_whole_module_that_the_last_pruning_finds(tmp_path):
    callback, before = ACDC(0.8, **OPTIONS), Before(16)
    module, run = fit([callback, before], seeded(lambda: Lit(cnn())), loader(160), max_epochs=1)
    dense = callback.dense_state_dict()
    plain = Lit(cnn())
    plain.load_state_dict(dense)
    for name, x in before.state.items():
        if "running" not in name and "num_batches" not in name:  # the pruning comes after a forward pass
            assert torch.equal(dense[name], x), name
    assert int(dense["net.5.num_batches_tracked"]) == 17
    for name in callback.masks:
        assert dense[name].count_nonzero() > 0.9 * dense[name].numel(), "but for gradients of 0"
    assert not torch.equal(dense["net.8.bias"], module.net[8].bias)
    checkpoint = saved(run, tmp_path / "last.ckpt")
    loaded = ACDC(0.8, **OPTIONS)
    loaded.load_state_dict(checkpoint["callbacks"][callback.state_key])
    assert all(torch.equal(x, dense[name]) for name, x in loaded.dense_state_dict().items())


def test_each_optimizer_s_weights_are_kept_when_they_are_pruned():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second) if batch_idx % 2 else (first,):
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in (first, second) if batch_idx % 2 else (first,):
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2:])]

    callback = ACDC(0.8, begin_at=0.0, last_dense=0.1, end_at=0.3)  # of 60 steps of both
    module = seeded(Two)
    fit(callback, module, loader(320), max_epochs=1)
    dense = callback.dense_state_dict()
    assert sum(int(dense[name].count_nonzero()) for name in callback.masks) > 0.6 * 392, "0.2 are left"
    groups = (["net.0.weight"], ["net.2.weight", "net.4.weight"])
    for names in groups:
        active = sum(int(callback.masks[name].sum()) for name in names)
        assert active == budget(0.8, sum(callback.masks[name].numel() for name in names))


def test_there_is_no_dense_network_before():
    with pytest.raises(RuntimeError, match=r"ACDC\(sparsity=0\.8\) has no dense network yet: it keeps the weights"):
        ACDC(0.8).dense_state_dict()


# ---------------------------------------------------------------------- fits


def test_another_fit_trains_the_sparse_network_on():
    callback = ACDC(0.8, **OPTIONS)
    module, _ = fit(callback, train=loader(160), max_epochs=1)
    masks, dense = callback.masks, callback.dense_state_dict()
    fit(callback, module, loader(160), max_epochs=1)
    assert all(torch.equal(mask, masks[name]) for name, mask in callback.masks.items())
    assert all(torch.equal(x, dense[name]) for name, x in callback.dense_state_dict().items())


def test_gradients_that_are_not_finite_are_named_as_the_cause_of_an_early_end():
    class Breaks(pl.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step > 14:
                module.net[2].weight.grad[0, 0] = torch.inf

    callback = ACDC(0.8, **OPTIONS)
    with pytest.warns(UserWarning, match=r"last sparse phase: gradients of net\.0\.weight, .* were not finite"):
        fit([callback, Breaks()], train=loader(160), max_epochs=1)
    assert callback.density == 1


def test_weights_that_join_are_pruned_with_the_others():
    class Unfreezes(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": [*self.net[4].parameters()]})

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[:4].parameters(), lr=0.1)

    module, callback = seeded(Unfreezes), ACDC(0.8)
    module.net[4].requires_grad_(requires_grad=True)
    x, y = data(80)
    fit(callback, module, DataLoader(TensorDataset(x, y), 8), max_epochs=4)
    assert set(callback.masks) == {"net.0.weight", "net.2.weight", "net.4.weight"}
    assert sum(callback.layer_count.values()) == budget(0.8, 392)


def test_a_training_that_ends_early_is_told_of():
    with pytest.warns(UserWarning, match="has not come to its last sparse phase: the training ended after 10 steps"):
        fit([ACDC(0.8), StopsAfter()], train=loader(80), max_epochs=4)


def test_cycles_that_do_not_fit_are_told_of():
    with pytest.warns(UserWarning, match="alternates 3 times only: the training has 10 steps"):
        fit(ACDC(0.8, cycles=20), train=loader(80), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin_at": 0.8}, r"begin_at must be below end_at - last_dense=0\.75, got 0\.8: the phases lie between"),
        ({"last_dense": 0.0}, r"last_dense must be above 0, got 0\.0"),
        ({"end_at": 1.2}, r"end_at must be a number from 0 to 1, got 1\.2"),
        ({"cycles": 0}, r"cycles must be an integer of at least 1, got 0.*'auto' takes the paper's number"),
        ({"scope": "model"}, r"scope must be one of \['global', 'layer'\], got 'model'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ACDC(0.8, **options)
