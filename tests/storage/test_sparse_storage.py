"""``storage="sparse"``: the same training as with masks, in layers that hold the nonzeros alone."""

import contextlib
import copy
import itertools
import pickle
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import storage_script
import torch
from helpers import (
    Largest,
    Lit,
    SavesFirst,
    Scaler,
    StopsAfter,
    Unmixed,
    fit,
    loader,
    mlp,
    same,
    saved,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_python, run_ranks
from torch import nn

import lightning_sparse.kernels.products as storage_backends
import lightning_sparse.storage.sparse as training
from lightning_sparse import DSR, DST, GGR, ITOP, MEST, SET, MemoryEfficientDST, RandomPruning, RigL
from lightning_sparse.kernels import numba_kernels
from lightning_sparse.rules import select
from lightning_sparse.storage import SparseConv2d, SparseLinear, load_dense, to_dense
from lightning_sparse.storage.measure import measure
from lightning_sparse.weights.base import MaskedWeight
from lightning_sparse.weights.sparse import SparseWeight

METHODS = {
    "SET": lambda **kw: SET(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "SET by epoch": lambda **kw: SET(**{"sparsity": 0.8, **kw}),
    "MemoryEfficientDST random": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "heuristic": "random", "subset_multiplier": 2, "update_every": 7, "stop_at": 0.9, **kw}
    ),
    "MemoryEfficientDST grabo": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "update_every": 7, "stop_at": 0.9, "min_layer_density": 0.05, **kw}
    ),
    "MemoryEfficientDST synflow": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "heuristic": "synflow", "update_every": 7, "stop_at": 0.9, **kw}
    ),
    "RigL": lambda **kw: RigL(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "GGR": lambda **kw: GGR(
        **{"sparsity": 0.8, "drop_fraction": 0.3, "update_every": 7, "stop_at": 0.9, "min_layer_density": 0.05, **kw}
    ),
    "ITOP gradient": lambda **kw: ITOP(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "ITOP random": lambda **kw: ITOP(**{"sparsity": 0.8, "growth": "random", "update_every": 7, **kw}),
    "MEST": lambda **kw: MEST(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "MEST soft bound": lambda **kw: MEST(**{"sparsity": 0.8, "soft_bound": True, "update_every": 7, **kw}),
    "DSR": lambda **kw: DSR(**{"sparsity": 0.8, "init_threshold": 0.05, "update_every": 7, **kw}),
    "RandomPruning": lambda **kw: RandomPruning(**{"sparsity": 0.8, **kw}),
}


@pytest.fixture(autouse=True)
def quick_and_the_same_everywhere(monkeypatch):
    """No measurement decides who multiplies."""
    monkeypatch.setattr(training, "measure", lambda layer: {"torch": 0.5, "dense": 1.0})


UPDATES = [name for name in METHODS if name != "RandomPruning"]
RESIZES = [name for name in METHODS if METHODS[name]().resizes]


def images(dtype=torch.float32):
    return nn.Sequential(
        nn.Unflatten(1, (4, 3, 1)),
        nn.Conv2d(4, 6, (3, 1), padding="same", groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, (2, 1), stride=(2, 1), padding=(1, 0), bias=False),
        nn.ReLU(),  # no batch-norm, which divides rounding errors by the variance of channels that have none
        nn.Flatten(),
        nn.Linear(16, 4),
    ).to(dtype)


def tokens(dtype=torch.float32):
    """A linear layer whose inputs have three dimensions."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(24, 4)
    ).to(dtype)


NETWORKS = {"mlp": mlp, "images": images}
OPTIMIZERS = {
    "momentum": None,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def run(callback, network=mlp, optimizer=None, **kwargs):
    module = seeded(lambda: Lit(network(torch.float64), optimizer))
    return fit(callback, module, loader(dtype=torch.float64), **{"precision": "64-true", **kwargs})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_with_masks(method, network, optimizer):
    """60 steps with updates, from the same seed: the same connections and the same weights."""
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
    assert sparse.watched == masked.watched


class Watches(pl.Callback):
    """See what the layers are while they train."""

    def __init__(self, callback):
        self.callback, self.counts, self.sizes, self.connections = callback, set(), [], []

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        layers = {name: layer for name, layer in module.named_modules() if name in ("net.0", "net.2", "net.4")}
        assert {type(layer) for layer in layers.values()} == {SparseLinear}
        self.counts.add(sum(layer.nnz for layer in layers.values()))
        self.sizes.append([layer.nnz for layer in layers.values()])
        self.connections.append([layer.positions for layer in layers.values()])
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
    module, _ = fit([callback, watches])
    budget = 392 - round(0.8 * 392)
    assert watches.counts == {budget} or (method == "MEST soft bound" and min(watches.counts) == budget)
    assert sum(watches.sizes[-1]) == budget
    moved = any(not torch.equal(a, b) for a, b in zip(watches.connections[0], watches.connections[-1], strict=True))
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
    weight.calls = [(torch.ones(1, 4), torch.tensor([[7.0, 8.0, 9.0]]))]
    weight.exchange(weight.positions[[1, 4]], torch.tensor([1, 4, 10]))
    assert layer.positions.tolist() == [0, 1, 4, 5, 6, 10]
    assert layer.values.tolist() == [1, 0, 0, 3, 4, 0]
    assert layer.values.grad.tolist() == [21, 7, 8, 23, 24, 9]
    assert state["exp_avg"].tolist() == [1, 0, 0, 3, 4, 0]
    assert state["exp_avg_sq"].tolist() == [11, 0, 0, 13, 14, 0]
    assert state["step"].shape == ()
    optimizer.step()


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(method, optimizer, plain, tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def module(seed=0):
        return seeded(lambda: Lit(images(), OPTIMIZERS[optimizer], schedule), seed)

    class Saves(pl.Callback):
        def on_train_epoch_end(self, run, module):
            if run.current_epoch == 1:
                with torch.no_grad():
                    module.net[6].values[:2] = torch.tensor([0.0, -0.0])  # of active connections
                run.save_checkpoint(tmp_path / "middle.ckpt")

    whole = METHODS[method](storage="sparse", plain_checkpoints=plain)
    resumed = METHODS[method](storage="sparse", plain_checkpoints=not plain)  # reads both
    theirs, first = fit([whole, Saves()], module(), max_epochs=3)
    ours = module(5)
    second = trainer(resumed, max_epochs=3)
    second.fit(ours, loader(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert second.global_step == first.global_step == 90
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    a, b = (run.optimizers[0].state_dict() for run in (first, second))
    assert a["param_groups"] == b["param_groups"]
    for key, kept in a["state"].items():
        assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(b["state"][key][k])) for k in kept)
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert resumed.watched == whole.watched
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


class SavesEachEpoch(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, run, module):
        run.save_checkpoint(self.path, weights_only=run.current_epoch == 0)


@pytest.mark.parametrize("method", UPDATES)
def test_checkpoint_written_during_a_fit_is_loaded_by_the_plain_module(method, tmp_path):
    callback, path = METHODS[method](storage="sparse"), tmp_path / "last.ckpt"
    module, _ = fit([callback, SavesEachEpoch(path)])
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Lit().state_dict())
    for found in (Lit.load_from_checkpoint(path, weights_only=True).state_dict(), load_dense(path)):
        assert all(torch.equal(found[name], x) for name, x in module.state_dict().items())
    for name, mask in callback.masks.items():
        positions = checkpoint["callbacks"][callback.state_key]["weights"][name]["positions"]
        assert torch.equal(positions.long(), mask.reshape(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("limit", [4 * 392, 4 * 392 - 1])
def test_checkpoints_are_plain_up_to_the_limit(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", limit)
    for asked in (None, True, False):
        fit([METHODS["SET"](storage="sparse", plain_checkpoints=asked), SavesEachEpoch(tmp_path / "w.ckpt")])
        state = torch.load(tmp_path / "w.ckpt", weights_only=True)["state_dict"]
        plain = limit == 4 * 392 if asked is None else asked
        assert ("net.0.weight" in state, "net.0.values" in state) == (plain, not plain)


def test_checkpoint_holds_the_nonzeros_alone_if_asked_and_load_dense_gives_the_plain_keys(tmp_path):
    callback = METHODS["MemoryEfficientDST grabo"](storage="sparse", plain_checkpoints=False)
    module, _ = fit([callback, SavesEachEpoch(tmp_path / "last.ckpt")])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    sizes = {key: x.numel() for key, x in checkpoint["state_dict"].items()}
    assert sizes["net.0.values"] + sizes["net.2.values"] + sizes["net.4.values"] == 78
    assert not any(key.endswith("weight") for key in sizes)
    assert "positions" not in str(checkpoint["callbacks"])
    for given in (checkpoint, tmp_path / "last.ckpt", str(tmp_path / "last.ckpt")):
        plain = load_dense(given)
        assert plain.keys() == Lit().state_dict().keys()
        assert all(torch.equal(plain[name], x) for name, x in module.state_dict().items())
    Lit().load_state_dict(plain)


def test_load_dense_says_what_is_wrong_with_what_it_is_given(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint must be a file that exists, got '.*nowhere'\. Give a Trainer"
    ):
        load_dense(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file that exists"):
        load_dense(str(tmp_path))
    with pytest.raises(ValueError, match="checkpoint must be the path of a file, got one of type Linear"):
        load_dense(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"with a 'state_dict' in it, got one that holds weight, bias\. Of a state dict"
    ):
        load_dense(nn.Linear(2, 2).state_dict())
    torch.save(torch.ones(2), tmp_path / "tensor")
    with pytest.raises(ValueError, match="with a 'state_dict' in it, got one that holds Tensor"):
        load_dense(tmp_path / "tensor")
    (tmp_path / "text").write_text("no checkpoint")
    torch.save({"state_dict": {}, "network": nn.Linear(2, 2)}, tmp_path / "module")
    for name in ("text", "module"):
        with pytest.raises(ValueError, match=rf"got '.*{name}', which torch.load refuses .* weights_only=False"):
            load_dense(tmp_path / name)
    assert load_dense(torch.load(tmp_path / "module", weights_only=False)) == {}


@pytest.mark.parametrize("plain", [True, False])
def test_checkpoint_of_the_weights_alone_is_plain_or_made_so(plain, tmp_path):
    callback = METHODS["SET"](storage="sparse", plain_checkpoints=plain)
    fit([callback, SavesEachEpoch(tmp_path / "w.ckpt")], max_epochs=1)
    Lit().load_state_dict(load_dense(tmp_path / "w.ckpt"))
    if plain:
        Lit.load_from_checkpoint(tmp_path / "w.ckpt", weights_only=True)


@pytest.mark.parametrize("plain", [True, False])
def test_checkpoint_written_after_the_fit_can_be_continued(plain, tmp_path):
    def callback():
        return METHODS["SET"](storage="sparse", plain_checkpoints=plain)

    module, run = fit(callback(), seeded(lambda: Lit(images())), max_epochs=1)
    checkpoint = saved(run, tmp_path / "end.ckpt")
    assert ("net.1.values" in checkpoint["state_dict"]) != plain
    assert type(module.net[1]) is nn.Conv2d
    assert all(torch.equal(load_dense(checkpoint)[name], x) for name, x in module.state_dict().items())
    longer = trainer(callback(), max_epochs=2)
    longer.fit(seeded(lambda: Lit(images()), 4), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert longer.global_step == 60


def test_state_dict_is_taken_back_during_a_fit_though_connections_are_0():
    class Swaps(pl.Callback):
        def on_train_epoch_end(self, run, module):
            layer = module.net[2]
            layer.values.data[:3] = 0
            kept, before = module.state_dict(), [layer.positions, layer.values.detach().clone()]
            layer.values.data += 1
            module.load_state_dict(kept)
            assert torch.equal(layer.positions, before[0])
            assert torch.equal(layer.values, before[1])

    fit([METHODS["SET"](storage="sparse"), Swaps()])


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_checkpoint_is_evaluated_in_the_module_be_it_plain_or_sparse(stage, plain, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", limit)
    callback = METHODS["SET"](storage="sparse", plain_checkpoints=plain)
    module, run = fit([callback, SavesEachEpoch(tmp_path / "last.ckpt")])
    assert type(module.net[0]) is (nn.Linear if limit else SparseLinear)
    expected = copy.deepcopy(to_dense(copy.deepcopy(module)).state_dict())
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    getattr(run, stage)(module, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    found = to_dense(module).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert not module._load_state_dict_pre_hooks


def test_a_plain_checkpoint_is_evaluated_without_the_callback(tmp_path):
    module, _ = fit([METHODS["SET"](storage="sparse"), SavesEachEpoch(tmp_path / "last.ckpt")])
    other = Lit()
    trainer([]).test(other, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in other.state_dict().items())


def test_storages_are_not_mixed_up(tmp_path):
    _, masked = fit(METHODS["SET"](), max_epochs=1)
    masked.save_checkpoint(tmp_path / "masked.ckpt")
    with pytest.raises(RuntimeError, match=r"net\.0\.weight is dense, the layer sparse: load it before"):
        trainer(METHODS["SET"](storage="sparse")).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "masked.ckpt")


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
    "LearningRateFinder": LearningRateFinder(num_training_steps=20, update_attr=False),
    "BatchSizeFinder": BatchSizeFinder(steps_per_trial=2, max_trials=3),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("method", "plain"), [("MemoryEfficientDST grabo", True), ("ITOP random", False)])
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
    assert callback.to_dense(module) is module
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


class OnMeta(Lit):
    """Has no weights before configure_model, and never a dense one."""

    def __init__(self, bias=True):
        super().__init__(nn.Identity())
        self.bias = bias

    def configure_model(self):
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(12, 300, self.bias), nn.ReLU(), nn.Linear(300, 4))


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


@pytest.mark.parametrize("method", ["MemoryEfficientDST grabo", "RigL", "GGR", "MEST", "MEST soft bound"])
@pytest.mark.parametrize(
    "options",
    [
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
        lambda: {"gradient_clip_val": 0.1},
        lambda: {"plugins": [Unmixed(Scaler())], "precision": None},
    ],
    ids=["accumulated", "clipped", "scaled"],
)
def test_what_lightning_does_with_gradients_is_as_with_masks(method, options):
    ours, theirs = (
        run(METHODS[method](storage=storage, update_every=5, seed=3), tokens, **options())[0]
        for storage in ("sparse", "masked")
    )
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["RigL", "GGR"])
def test_growth_does_not_depend_on_how_many_rows_are_looked_at_at_once(method, network, monkeypatch):
    expected, _ = run(METHODS[method](storage="sparse", seed=3), NETWORKS[network])
    monkeypatch.setattr("lightning_sparse.weights.sparse._CHUNK", 1)
    module, _ = run(METHODS[method](storage="sparse", seed=3), NETWORKS[network])
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in expected.state_dict().items())


@pytest.mark.parametrize("method", ["RigL", "GGR", "ITOP gradient", "ITOP random", "MEST", "MEST soft bound", "DSR"])
def test_no_tensor_is_near_the_size_of_the_dense_weight(method, monkeypatch):
    """Nor of its gradient, in the whole of a fit with updates; ITOP has a bit for each weight."""
    monkeypatch.setattr(training, "measure", lambda layer: {"numba": 0.5, "dense": 1.0})  # Largest sees no CSR tensor
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    monkeypatch.setattr("lightning_sparse.weights.sparse._CHUNK", 1 << 14)

    class Wide(OnMeta):
        def configure_model(self):
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 300), nn.Linear(300, 4))

    module = seeded(Wide)
    with Largest() as largest:
        fit(METHODS[method](storage="sparse", sparsity=0.98, update_every=2, min_layer_density=0.0), module)
    assert type(module.net[2]) is SparseLinear
    rows = (1 << 14) // 4 // 300
    assert largest.size <= 300 * 300 / (8 if "ITOP" in method else 10)
    if method in ("RigL", "GGR"):
        assert rows * 300 <= largest.size, "they look at some rows at a time"


def test_equal_gradients_grow_by_position():
    """As with masks, whatever is looked at at once; gradients of whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(30, 20, 60, generator=generator)
    h, delta = (torch.randint(-1, 2, (4, n), generator=generator).float() for n in (30, 20))
    weight = SparseWeight("weight", (20, 30), layer)
    weight.calls = [(h[:1], delta[:1]), (h[1:], delta[1:])]
    dense = MaskedWeight("weight", weight.mask, parameter=nn.Parameter(layer.dense_weight()))
    dense.parameter.grad = delta.t() @ h
    for n in (0, 1, 5, 50, 200, 540):
        positions, gradients = weight.steepest(n)
        expected = select.top_k(dense.dP.abs(), n, among=~dense.mask).reshape(-1).nonzero().squeeze(1)
        assert torch.equal(positions, expected)
        assert torch.equal(gradients, dense.dP.abs().reshape(-1)[expected])
        for theirs, ours in zip(dense.steepest(n), (positions, gradients), strict=True):
            assert torch.equal(theirs, ours)
    assert (weight.steepest(540)[1] == weight.steepest(540, above=1.0)[1].min()).any()


def test_a_sparse_weight_keeps_what_a_masked_one_does():
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(30, 20, 200, generator=generator)
    with torch.no_grad():
        layer.values.copy_(torch.randint(1, 6, (200,), generator=generator))  # many equals
    sparse = SparseWeight("weight", (20, 30), layer)
    masked = MaskedWeight("weight", sparse.mask, nn.Parameter(layer.dense_weight()))
    for weight in (sparse, masked):
        weight.optimizer = torch.optim.Adam([weight.parameter])
        weight.parameter.grad = torch.ones_like(weight.W)
        weight.optimizer.step()
    kept = torch.rand(20, 30, generator=generator) < 0.7
    for move in (lambda weight: weight.keep(kept), lambda weight: weight.keep_largest(50)):
        move(sparse)
        move(masked)
        assert torch.equal(sparse.mask, masked.mask)
        assert torch.equal(layer.dense_weight(), masked.W)
        assert sparse.W.shape == next(iter(sparse.optimizer_state()))[1].shape
    assert layer.nnz == 50


@pytest.mark.parametrize(("x", "finite"), [(1.0, True), (3e38, False), (float("inf"), False), (float("nan"), False)])
def test_gradients_of_connections_that_do_not_exist_have_to_be_finite_too(x, finite):
    layer = SparseLinear(3, 2, 1)
    weight = SparseWeight("weight", (2, 3), layer)
    layer.values.grad = torch.zeros(1)
    assert weight.finite
    weight.calls = [(torch.ones(2, 3), torch.tensor([[1.0, 1.0], [1.0, x]])), (torch.ones(0, 3), torch.ones(0, 2))]
    weight.calls.append((torch.ones(2, 3), torch.tensor([[1.0, 1.0], [1.0, x]])))
    assert weight.finite == finite


def test_bfloat16_autocast_trains():
    module, _ = fit(METHODS["MemoryEfficientDST grabo"](storage="sparse"), precision="bf16-mixed")
    assert all(parameter.isfinite().all() for parameter in module.parameters())


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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 3, 4))[0][:, -1])


@pytest.mark.parametrize(
    ("network", "named", "exclude"),
    [
        (Recurrent, r"net\.rnn\.weight_ih_l0 \(GRU\), net\.rnn\.weight_hh_l0 \(GRU\)", ["*.rnn.*"]),
        (Tied, r"net\.a\.weight \(Linear, tied to net\.b\.weight: a sparse layer cannot share", ["*.a.weight"]),
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 4)), r"net\.0\.weight \(Bilinear\)", None),
    ],
)
def test_layers_that_have_no_sparse_form_are_named(network, named, exclude):
    with pytest.raises(MisconfigurationException, match=f"plain nn.Linear and nn.Conv2d layers only, not .*{named}"):
        fit(RandomPruning(0.5, storage="sparse"), Lit(network()))
    if exclude is not None:
        fit(RandomPruning(0.5, storage="sparse", exclude=exclude), Lit(network()))


def test_code_that_reads_the_dense_weight_is_told_what_to_do():
    class Reads(Lit):
        def forward(self, x):
            return nn.functional.linear(x, self.net[0].weight)

    with pytest.raises(AttributeError, match="has no dense weight"):
        fit(RandomPruning(0.5, storage="sparse"), Reads())


def test_weights_that_no_optimizer_owns_are_named():
    module = Lit()
    module.make_optimizer = lambda p: torch.optim.SGD(module.net[0].parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match=r"No optimizer owns \['net\.2\.weight', 'net\.4\.weight'\]"):
        fit(RandomPruning(0.5, storage="sparse"), module)


def test_other_methods_refuse_sparse_layers(monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    module, _ = fit(RandomPruning(0.8, storage="sparse"))
    for method in (DST(alpha=1e-3), RigL(0.8), SET(0.8)):
        with pytest.raises(MisconfigurationException, match=r"net\.0\.weight is held by a sparse layer"):
            fit(method, module)
    fit(SET(0.8), to_dense(module))


@pytest.mark.parametrize("method", [SET, RigL, GGR, ITOP, MEST, DSR, MemoryEfficientDST, RandomPruning])
def test_arguments_are_checked(method):
    with pytest.raises(ValueError, match=r"storage must be one of \['masked', 'sparse'\], got 'dense'"):
        method(0.8, storage="dense")
    with pytest.raises(ValueError, match=r"plain_checkpoints is for storage='sparse', got True with storage='masked'"):
        method(0.8, plain_checkpoints=True)


LARGE = """
import lightning.pytorch as pl
import torch
from processes import run_python, run_ranks
from torch import nn
from lightning_sparse import MemoryEfficientDST
from lightning_sparse.accounting.memory import peak_memory
from lightning_sparse.storage import SparseLinear

torch.set_num_threads(1)


class Wide(pl.LightningModule):
    def configure_model(self):
        with torch.device("meta"):
            self.layer = nn.Linear(65536, 65536, bias=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


callback = MemoryEfficientDST(0.9999, update_every=1, stop_at=1.0, storage="sparse")
run = pl.Trainer(max_steps=3, callbacks=callback, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False, accelerator="cpu")
module = Wide()
run.fit(module, torch.utils.data.DataLoader(torch.randn(12, 65536), batch_size=4))
assert type(module.layer) is SparseLinear
assert module.layer.nnz == 2**32 - round(0.9999 * 2**32)
print(peak_memory())
"""


def test_a_layer_of_65536_by_65536_trains_and_moves_connections_in_little_memory():
    """Dense it takes 17 GB, for each of weight, gradient and momentum."""
    printed = run_python("-c", LARGE)
    assert float(printed) < 1.5e9


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each process saw."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks("storage_script.py", world, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def equal(a, b):
    return all(torch.equal(x, b[kind][name]) for kind in ("parameters", "masks") for name, x in a[kind].items())


@pytest.mark.xdist_group("ddp")
def test_processes_train_as_one_on_the_same_global_batches_and_agree_to_the_last_bit(ranks):
    for case in [case for case in ranks[0] if isinstance(case, tuple)]:
        first, *others = (rank[case] for rank in ranks)
        assert all(equal(first, other) for other in others), case
        alone = storage_script.train(*case, 0, 1)
        assert all(torch.equal(mask, alone["masks"][name]) for name, mask in first["masks"].items()), case
        for name, x in first["parameters"].items():
            assert torch.allclose(x, alone["parameters"][name], rtol=0, atol=1e-12), case
        for x, y in zip(first["momentum"], alone["momentum"], strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-12), case


@pytest.mark.xdist_group("ddp")
def test_a_step_sends_the_nonzeros_alone(ranks):
    """Beside 30 biases, 8 bytes each; values that change their length are sent with a mark for each of 3 layers."""
    for case in [case for case in ranks[0] if isinstance(case, tuple)]:
        steps = ranks[0][case]["bytes"]
        assert len(steps) == 40 // case[1]
        sent = {"SET masked": 392, "SET": 78, "RigL": 78, "ITOP": 78, "MEST": 78}.get(case[0], 78 + 3)
        plain = [step for number, step in enumerate(steps) if number % 5 or not number]
        assert set(plain) == {8 * (sent + 30)} or case[0] == "MEST soft bound", case


@pytest.mark.xdist_group("ddp")
def test_resume_under_ddp_is_that_of_the_uninterrupted_run(ranks):
    if "resumed" in ranks[0]:
        assert all(equal(rank["grabo", 2], rank["resumed"]) for rank in ranks)


@pytest.mark.xdist_group("ddp")
def test_processes_agree_on_unused_layers_and_on_steps_to_skip(ranks):
    if "failed" in ranks[0]:
        first, second = (rank["failed"] for rank in ranks)
        assert equal(first, second)
        assert first["skipped"] == second["skipped"] == 1
        assert all(x.isfinite().all() for x in first["parameters"].values())


@pytest.mark.xdist_group("ddp")
def test_gradients_are_averaged_also_where_some_processes_have_none(ranks):
    world = len(ranks)
    for rank in ranks:
        used, unused, partly, single = rank["averages"]
        assert used.tolist() == pytest.approx([(world + 1) / 2] * 3)
        assert unused is None
        assert partly.tolist() == pytest.approx([6 / world] * 3)
        assert single.isinf().all()


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


def test_ddp_must_have_a_parameter_of_its_own():
    module = Lit(nn.Linear(12, 4, bias=False))
    strategy = SimpleNamespace(world_size=2, strategy=DDPStrategy())
    with pytest.raises(MisconfigurationException, match=r"DDP needs a parameter of its own .* Give a layer"):
        MemoryEfficientDST(0.8, storage="sparse", seed=1)._make_sparse(strategy, module)


@pytest.mark.parametrize("ends", ["whole", "error"])
def test_after_a_fit_ddp_has_all_parameters_again(ends, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)

    class Looks(pl.Callback):
        def on_train_start(self, run, module):
            assert {"mine", "net.0.values", "net.0.crow"} <= set(module._ddp_params_and_buffers_to_ignore)
            if ends == "error":
                raise RuntimeError("stop")

    module = seeded(Lit)
    module._ddp_params_and_buffers_to_ignore = ["mine"]
    with contextlib.suppress(RuntimeError):
        fit([METHODS["MemoryEfficientDST grabo"](storage="sparse"), Looks()], module, max_epochs=1)
    assert module._ddp_params_and_buffers_to_ignore == ["mine"]


@pytest.mark.parametrize(
    ("layer", "backends"),
    [
        (SparseLinear(3000, 2000, 60_000), ["numba", "torch"]),
        (SparseLinear(5, 4, 3, dtype=torch.bfloat16), ["numba", "torch"]),
        (SparseConv2d(200, 100, (3, 1), 3000, stride=2, groups=4), ["torch"]),
        (SparseConv2d(1, 6, 5, 20, dtype=torch.float64), ["numba"]),
    ],
)
def test_times_are_measured_without_touching_random_numbers(layer, backends, monkeypatch):
    monkeypatch.setattr(storage_backends.kernels, "_numba", lambda: None if backends == ["torch"] else numba_kernels)
    monkeypatch.setattr(storage_backends.kernels, "_wanted", lambda: "numba" if backends == ["numba"] else "auto")
    before = torch.get_rng_state()
    seconds = measure(layer)
    assert list(seconds) == [*backends, "dense"]
    assert all(0 < time < 100 for time in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.values.grad is None
    assert layer.backend is None


def test_the_measurement_ends_when_its_time_is_up(monkeypatch):
    clock = itertools.count(0, 0.4)  # a turn takes 0.4 s and as much passes before the next
    monkeypatch.setattr("lightning_sparse.storage.measure.time.perf_counter", lambda: next(clock))
    calls = []
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: calls.append(self.backend) or x * self.values.sum())
    names = list(measure(SparseLinear(5, 4, 3)))[:-1]
    assert calls == names * 2, "one that does not count, one that does"


TIMES = {"numba": 0.5, "torch": 0.4, "dense": 1.0}


def slower(told):
    return [str(warning.message) for warning in told if "slower here than" in str(warning.message)]


@pytest.mark.parametrize(("factor", "warns"), [(1, False), (3, True)])
def test_the_quicker_backend_is_chosen_and_slowness_is_warned_of(factor, warns, monkeypatch):
    times = {name: seconds * (factor if name != "dense" else 1) for name, seconds in TIMES.items()}
    monkeypatch.setattr(training, "measure", lambda layer: times)
    looks, callback = Backends(), RandomPruning(0.8, storage="sparse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([callback, looks], max_epochs=1)
    assert looks.seen == {"torch"}
    assert callback.state_dict()["backend"] == "torch"
    assert bool(slower(caught)) == warns
    told = "net.0.weight, of density 0.167, takes about 1.2 x a dense layer's time with torch, numba 1.5 x"
    assert all(told in message for message in slower(caught))


class Backends(pl.Callback):
    """See who multiplies."""

    def on_train_start(self, run, module):
        self.seen = {layer.backend for layer in module.net if isinstance(layer, SparseLinear)}


def test_a_resumed_run_multiplies_as_the_checkpoint_says(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure", lambda layer: TIMES)
    fit([METHODS["SET"](storage="sparse"), SavesFirst(tmp_path / "one.ckpt")])
    monkeypatch.setattr(training, "measure", lambda layer: {"numba": 0.1, "torch": 0.4, "dense": 1.0})
    looks = Backends()
    trainer([METHODS["SET"](storage="sparse"), looks]).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert looks.seen == {"torch"}
    fit([METHODS["SET"](storage="sparse"), looks], max_epochs=1)
    assert looks.seen == {"numba"}, "another fit measures again"
    monkeypatch.setattr(training, "measure", lambda layer: {"numba": 0.1, "dense": 1.0})
    with pytest.warns(UserWarning, match=r"trained with the backend 'torch', which is not available here \(numba\)"):
        trainer([METHODS["SET"](storage="sparse"), looks]).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert looks.seen == {"numba"}


def test_deterministic_training_does_not_choose_by_time(monkeypatch):
    monkeypatch.setattr(training, "measure", lambda layer: TIMES)
    looks = Backends()
    try:
        fit([RandomPruning(0.8, storage="sparse"), looks], max_epochs=1, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert looks.seen == {"numba"}
