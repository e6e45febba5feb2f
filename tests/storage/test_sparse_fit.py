"""``storage="sparse"``: the same training as with masks, in layers that hold the nonzeros alone."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Lit,
    SavesFirst,
    StopsAfter,
    fit,
    loader,
    mlp,
    same,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stored import METHODS, NETWORKS, OPTIMIZERS, RESIZES, UPDATES, OnMeta, run
from torch import nn

import lightning_sparse.storage.sparse as training
from lightning_sparse import SET, RandomPruning
from lightning_sparse.storage import SparseLinear, to_dense
from lightning_sparse.weights.sparse import SparseWeight


@pytest.mark.parametrize(("network", "optimizer"), [("mlp", "momentum"), ("images", "adamw")])
@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_with_masks(method, network, optimizer):
    """30 steps with updates, from the same seed: the same connections and the same weights."""
    masked, sparse = METHODS[method](seed=3), METHODS[method](seed=3, storage="sparse")
    ours, _ = run(sparse, NETWORKS[network], OPTIMIZERS[optimizer])
    theirs, _ = run(masked, NETWORKS[network], OPTIMIZERS[optimizer])
    assert sparse.masks.keys() == masked.masks.keys()
    for name, mask in masked.masks.items():
        assert torch.equal(sparse.masks[name], mask)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, parameter in theirs.named_parameters():
        difference = (ours.get_parameter(name) - parameter).norm() / parameter.norm()
        assert difference < 1e-10, name
    assert sparse.density == masked.density
    assert sparse.extra_metrics == masked.extra_metrics


class Watches(pl.Callback):
    """See what the layers are while they train."""

    def __init__(self, callback):
        self.callback, self.counts, self.sizes, self.mask_versions = callback, set(), [], []

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        layers = {name: layer for name, layer in module.named_modules() if name in ("net.0", "net.2", "net.4")}
        assert {type(layer) for layer in layers.values()} == {SparseLinear}
        self.counts.add(sum(layer.nnz for layer in layers.values()))
        self.sizes.append([layer.nnz for layer in layers.values()])
        self.mask_versions.append([layer.positions for layer in layers.values()])
        (optimizer,) = run.optimizers
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for layer in layers.values():
            assert any(layer.values is parameter for parameter in owned)
            momentum = optimizer.state[layer.values]["momentum_buffer"]
            assert momentum.shape == layer.values.shape == layer.col.shape
            if layer.values.grad is not None:  # RigL's updates leave none to the optimizer
                assert layer.values.grad.shape == layer.values.shape


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_nonzeros_is_the_budget_at_every_step(method):
    callback = METHODS[method](storage="sparse")
    watches = Watches(callback)
    module, _ = fit([callback, watches], train=loader(120))
    budget = 392 - round(0.8 * 392)
    if method == "SRigL":  # whose fan-ins are whole
        assert watches.sizes[0] == [32, 30, 16]
        assert all(2 * abs(n - first) <= 16 for n, first in zip(watches.sizes[-1], watches.sizes[0], strict=True))
    else:
        assert watches.counts == {budget} or (method == "MEST soft bound" and min(watches.counts) == budget)
        assert sum(watches.sizes[-1]) == budget
    moved = any(not torch.equal(a, b) for a, b in zip(watches.mask_versions[0], watches.mask_versions[-1], strict=True))
    assert moved == (method in UPDATES)
    assert (len(set(map(tuple, watches.sizes))) > 1) == (method in RESIZES), "layers change size"
    assert {type(layer) for layer in module.net[::2]} == {nn.Linear}, "dense again after the fit"
    for name, mask in callback.masks.items():
        assert not module.get_parameter(name)[~mask].any()


def test_momentum_and_moments_move_with_their_connections():
    layer = SparseLinear(4, 3, 5)
    layer.set_connections(torch.tensor([0, 2, 5, 6, 11]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    weight = SparseWeight("weight", (3, 4), layer)
    weight.optimizer = optimizer
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.values]
    state["exp_avg"], state["exp_avg_sq"] = torch.arange(1.0, 6), torch.arange(11.0, 16)
    layer.values.grad = torch.arange(21.0, 26)
    weight.gradient.calls = [(torch.ones(1, 4), torch.tensor([[7.0, 8.0, 9.0]]))]
    weight.rewire(weight.active_indices[[1, 4]], torch.tensor([1, 4, 10]))
    assert layer.positions.tolist() == [0, 1, 4, 5, 6, 10]
    assert layer.values.tolist() == [1, 0, 0, 3, 4, 0]
    assert layer.values.grad.tolist() == [21, 7, 8, 23, 24, 9]
    assert state["exp_avg"].tolist() == [1, 0, 0, 3, 4, 0]
    of_row, of_layer = (13 + 14) / 2, (11 + 13 + 14) / 3  # the last row has no other
    assert state["exp_avg_sq"].tolist() == pytest.approx([11, 11, of_row, 13, 14, of_layer])
    assert state["step"].shape == ()
    optimizer.step()


# ---------------------------------------------------------------------- fits


def test_a_second_fit_goes_on_with_the_connections_of_the_first():
    callback = RandomPruning(0.8, storage="sparse")
    module, _ = fit(callback)
    before = callback.masks
    fit(callback, module)
    assert all(torch.equal(mask, callback.masks[name]) for name, mask in before.items())
    fit(RandomPruning(0.8, storage="sparse", seed=99), module)


def test_mests_soft_bound_goes_on_in_a_second_fit_after_one_that_ended_above_the_budget():
    counts = []
    for storage in ("sparse", "masked"):
        callback, module = METHODS["MEST soft bound"](storage=storage, seed=3), seeded(Lit)
        with pytest.warns(UserWarning, match="active weights above its budget"):
            fit([callback, StopsAfter()], module)
        counts.append([78 + callback.surplus])
        fit(callback, module)
        counts[-1].append(sum(int(mask.sum()) for mask in callback.masks.values()))
        assert copy.deepcopy(callback).surplus == callback.surplus == 0
    assert counts[0] == counts[1] == [counts[0][0], 78]
    assert counts[0][0] > 78


def test_mests_soft_bound_moves_connections_also_of_layers_without_gradient():
    class Half(Lit):
        def training_step(self, batch, batch_idx):
            whole = super().training_step(batch, batch_idx)
            return whole if batch_idx % 7 else self.net[0](batch[0]).pow(2).mean()

    def module():
        return seeded(lambda: Half(mlp(torch.float64)))

    masked, sparse = (METHODS["MEST soft bound"](seed=3, storage=storage) for storage in ("masked", "sparse"))
    theirs, ours = (
        fit(callback, module(), loader(dtype=torch.float64), precision="64-true")[0] for callback in (masked, sparse)
    )
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in masked.masks.items())
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=0, atol=1e-12)


class Tuned(Lit):
    lr, batch_size = 0.1, 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    def train_dataloader(self):
        return loader(48, self.batch_size)

    def val_dataloader(self):
        return loader(8)


TUNERS = {
    "lr_find": lambda run, module: Tuner(run).lr_find(module, num_training=20, update_attr=False),
    "scale_batch_size": lambda run, module: Tuner(run).scale_batch_size(module, steps_per_trial=2, max_trials=3),
    "BatchSizeFinder": BatchSizeFinder(steps_per_trial=2, max_trials=3),
}


@pytest.mark.parametrize(
    ("tuner", "method", "plain"),
    [
        ("lr_find", "MemoryEfficientDST grabo", True),
        ("BatchSizeFinder", "MemoryEfficientDST grabo", True),
        ("scale_batch_size", "ITOP random", False),
    ],
)
def test_tuners_leave_no_trace(method, plain, tuner, tmp_path):
    callback, alone = (METHODS[method](storage="sparse", plain_checkpoints=plain) for _ in range(2))
    module, tune = seeded(Tuned), TUNERS[tuner]
    callbacks = [callback] if callable(tune) else [callback, tune]
    run = trainer(callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    if callable(tune):
        tune(run, module)
    run.fit(module)
    other = seeded(Tuned)
    assert "atch" not in tuner or module.batch_size > other.batch_size
    other.batch_size = module.batch_size
    trainer(alone).fit(other)
    assert same(state(alone), state(callback))
    assert same(alone.masks, callback.masks)
    assert same(module.state_dict(), other.state_dict())


def test_another_module_starts_afresh():
    callback = RandomPruning(0.8, storage="sparse")
    fit(callback)
    with pytest.warns(UserWarning, match="starts afresh"):
        fit(callback, seeded(Lit, 8))


def test_a_large_module_keeps_its_sparse_layers_until_it_is_made_dense(monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 1000)
    callback = METHODS["MemoryEfficientDST grabo"](storage="sparse")
    module, run = fit(callback)
    assert {type(layer) for layer in module.net[::2]} == {SparseLinear}
    run.validate(module, loader(), verbose=False)
    before = module(torch.ones(1, 12))
    fit(callback, module)
    with pytest.raises(MisconfigurationException, match=r"have 78 connections, sparsity=0\.5 asks for 196"):
        fit(RandomPruning(0.5, storage="sparse"), module)
    after = module(torch.ones(1, 12))
    assert not torch.equal(before, after)
    assert to_dense(module) is module
    assert {type(layer) for layer in module.net[::2]} == {nn.Linear}
    assert torch.allclose(module(torch.ones(1, 12)), after, atol=1e-6)


def test_an_interrupted_fit_can_be_resumed_in_the_same_process(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            if run.global_step == 40:
                raise RuntimeError("stop")

    callback, module = METHODS["SET"](storage="sparse"), seeded(Lit)
    with pytest.raises(RuntimeError, match="stop"):
        fit([callback, SavesFirst(tmp_path / "one.ckpt"), Stops()], module)
    assert type(module.net[0]) is SparseLinear
    assert not module.net[0]._forward_hooks
    again = trainer(callback)
    again.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt")
    whole = METHODS["SET"](storage="sparse")
    expected, _ = fit(whole)
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in expected.state_dict().items())


@pytest.mark.parametrize("method", ["SET", "MemoryEfficientDST grabo"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_on_the_meta_device_are_drawn_for_their_actual_fan_in(method, bias):
    class Looks(pl.Callback):
        def on_train_start(self, run, module):
            layer = module.net[2]
            fan_in = layer.crow.diff().repeat_interleave(layer.crow.diff())
            scaled = layer.values.detach() * fan_in.sqrt()
            assert scaled.abs().max() <= 1
            assert 0.4 < scaled.abs().mean() < 0.6, "uniform"
            assert not any(parameter.is_meta for parameter in module.parameters())
            self.started = layer.values.clone()

    callback, twin, looks = METHODS[method](storage="sparse"), METHODS[method](storage="sparse"), [Looks(), Looks()]
    module, _ = fit([callback, looks[0]], seeded(lambda: OnMeta(bias)))
    fit([twin, looks[1]], seeded(lambda: OnMeta(bias)))
    assert torch.equal(looks[0].started, looks[1].started), "the run's seed decides"
    assert type(module.net[0]) is nn.Linear
    assert sum(int(mask.sum()) for mask in callback.masks.values()) == 960


def test_callback_is_copied_and_pickled_during_and_after_fit():
    callback = METHODS["MemoryEfficientDST grabo"](storage="sparse")

    class Copies(pl.Callback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
                assert all(torch.equal(mask, other.masks[name]) for name, mask in callback.masks.items())

    fit([callback, Copies()], max_epochs=1, limit_train_batches=8)
    assert all(torch.equal(mask, copy.deepcopy(callback).masks[name]) for name, mask in callback.masks.items())


def test_hooks_are_gone_but_for_the_steps_that_move_connections():
    class Looks(pl.Callback):
        def __init__(self):
            self.hooked = []

        def on_before_zero_grad(self, run, module, optimizer):
            self.hooked.append(len(module.net[0]._forward_hooks))

    looks = Looks()
    fit([METHODS["SET"](storage="sparse"), looks], max_epochs=1)
    assert [step for step, hooks in enumerate(looks.hooked) if hooks] == [7, 14, 21, 28]


# ---------------------------------------------------------------------- what cannot be


def test_a_fit_that_fails_before_its_start_leaves_the_module_alone():
    class Fails(pl.Callback):
        def setup(self, run, module, stage):
            assert "configure_model" in vars(module)
            raise RuntimeError("early")

    module = seeded(Lit)
    with pytest.raises(RuntimeError, match="early"):
        fit([RandomPruning(0.8, storage="sparse"), Fails()], module)
    assert "configure_model" not in vars(module)
    assert type(module.net[0]) is nn.Linear
    fit(SET(0.8), module)


def test_the_module_is_pickled_during_a_fit():
    class Pickles(pl.Callback):
        def on_train_start(self, run, module):
            assert not {"configure_model", "on_load_checkpoint"} & vars(module).keys()
            pickle.loads(pickle.dumps(module.net))
            copy.deepcopy(module)

    fit([METHODS["MemoryEfficientDST grabo"](storage="sparse"), Pickles()], max_epochs=1)


def test_two_methods_share_a_module():
    first = SET(0.8, storage="sparse", update_every=7, include=["net.0.*"])
    second = RandomPruning(0.5, storage="sparse", include=["net.2.*"])
    fit([first, second, SET(0.7, include=["net.4.*"])])
    assert (first.masks.keys(), second.masks.keys()) == ({"net.0.weight"}, {"net.2.weight"})
    assert (int(first.masks["net.0.weight"].sum()), int(second.masks["net.2.weight"].sum())) == (38, 80)
