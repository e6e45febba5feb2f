"""How sparse layers compute: as is quickest with the inputs of the first batch, measured there."""

import itertools
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Lit,
    SavesFirst,
    fit,
    loader,
    seeded,
    trainer,
)
from stored import METHODS, TIMES, images, measured

import lightning_sparse.storage.compare as compare
import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse import RandomPruning
from lightning_sparse.kernels import dispatch
from lightning_sparse.storage import SparseConv2d, SparseLinear
from lightning_sparse.storage.measure import Input, Inputs, choose, measure, measure_all, ways


@pytest.mark.parametrize(
    ("layer", "shape", "dtype"),
    [
        (SparseLinear(3000, 2000, 60_000), (7, 3000), torch.float32),
        (SparseLinear(5, 4, 3, dtype=torch.bfloat16), (2, 3, 5), torch.bfloat16),
        (SparseLinear(5, 4, 3), (5,), torch.float32),
        (SparseConv2d(8, 12, (3, 1), 30, stride=2, groups=4), (3, 8, 9, 9), torch.float32),
        (SparseConv2d(1, 6, 5, 20, dtype=torch.float64), (1, 8, 8), torch.float64),
    ],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_times_are_measured_without_a_trace(layer, shape, dtype, requires_grad):
    called = []
    handles = [layer.register_forward_hook(lambda *_: called.append(1)), layer.values.register_hook(called.append)]
    before = torch.get_rng_state()
    seconds = measure(layer, Input(shape, dtype, requires_grad), ["torch", "numba", "dense"])
    assert list(seconds) == ["torch", "numba", "dense"]
    assert all(0 < time < 100 for time in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.values.grad is None
    assert layer.backend is None
    handles[0].remove()


def test_the_measurement_ends_when_its_time_is_up(monkeypatch):
    clock = itertools.count(0, 0.1)  # a turn takes 0.1 s and as much passes before the next
    monkeypatch.setattr("lightning_sparse.storage.measure.time.perf_counter", lambda: next(clock))
    calls = []
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: calls.append(self.backend) or x * self.values.sum())
    measure(SparseLinear(5, 4, 3, bias=False), Input((2, 5), torch.float32, True), ["numba", "torch"])
    assert calls == ["numba", "torch"] * 2, "one that does not count, one that does"


def test_layers_of_one_kind_are_measured_once(monkeypatch):
    seen = []

    def noted(layer, like, names, context):
        seen.append((layer.shape, like.shape, names))
        return {"torch": float(len(seen))}

    monkeypatch.setattr("lightning_sparse.storage.measure.measure", noted)
    layers = {
        "a": SparseLinear(6, 5, 4),
        "b": SparseLinear(6, 5, 4),
        "denser": SparseLinear(6, 5, 9),
        "more": SparseLinear(6, 5, 4),
        "unused": SparseLinear(6, 5, 4),
    }
    few, many = Input((2, 6), torch.float32, True), Input((3, 6), torch.float32, True)
    inputs = {"a": few, "b": few, "denser": few, "more": many}
    found = measure_all(layers, inputs, lambda layer: ["torch"])
    assert found == {"a": {"torch": 1.0}, "b": {"torch": 1.0}, "denser": {"torch": 2.0}, "more": {"torch": 3.0}}
    assert seen == [((5, 6), (2, 6), ["torch"])] * 2 + [((5, 6), (3, 6), ["torch"])]


def test_the_largest_input_that_a_layer_is_trained_with_is_noted():
    layer = SparseLinear(6, 5, 4)
    inputs = Inputs({"a": layer, "unused": SparseLinear(2, 2, 1)})
    layer(torch.ones(2, 6))
    layer(input=torch.ones(3, 6, requires_grad=True))
    layer(torch.ones(1, 6))
    with torch.no_grad():
        layer(torch.ones(9, 6))
    inputs.close()
    layer(torch.ones(9, 6))
    assert inputs.found == {"a": Input((3, 6), torch.float32, True)}


class Ways(pl.Callback):
    """See how layers compute, before the first step and at the end."""

    def on_train_start(self, run, module):
        self.first = self.of(module)

    def on_train_end(self, run, module):
        self.last = self.of(module)

    def of(self, module):
        return [layer.backend for layer in module.net if isinstance(layer, (SparseLinear, SparseConv2d))]


def test_each_layer_computes_as_is_quickest(monkeypatch, caplog):
    def times(layer):
        return {16: {"numba": 0.5, "torch": 0.4, "dense": 1.0}, 12: {"numba": 0.3, "torch": 0.4, "dense": 1.0}}.get(
            layer.shape[1], {"numba": 3.0, "torch": 4.0, "dense": 1.0}
        )

    monkeypatch.setattr(layer_backends, "measure_all", measured(times))
    looks, callback = Ways(), RandomPruning(0.8, storage="sparse")
    with caplog.at_level("INFO"):
        fit([callback, looks], max_epochs=1)
    assert looks.first == [None] * 3
    assert looks.last == ["numba", "torch", "dense"] or looks.last[0] == "numba"
    assert list(callback.state_dict()["backends"].values()) == looks.last
    assert "net.0.weight with numba in 0.3 of the time with dense weights" in caplog.text
    assert "with dense weights, made for each pass" in caplog.text


@pytest.mark.parametrize("network", [None, images])
def test_training_with_dense_weights_for_each_pass_is_that_with_masks(network, monkeypatch):
    monkeypatch.setattr(layer_backends, "measure_all", measured({"numba": 2.0, "torch": 3.0, "dense": 1.0}))

    def train(**options):
        module = seeded(lambda: Lit(*([] if network is None else [network(torch.float64)])).double())
        callback = METHODS["RigL"](seed=3, **options)
        return callback, *fit([callback, looks], module, loader(dtype=torch.float64), precision="64-true")

    looks = Ways()
    masked, theirs, _ = train()
    sparse, ours, _ = train(storage="sparse")
    assert set(looks.last) == {"dense"}
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in masked.masks.items())
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=0, atol=1e-10), name


def test_sparse_products_must_be_clearly_quicker():
    layers = {name: SparseLinear(4, 3, 2) for name in ("clearly", "hardly", "unknown")}
    taken = {"clearly": {"torch": 0.89, "dense": 1.0}, "hardly": {"torch": 0.91, "dense": 1.0}}
    assert choose(layers, taken) == {"clearly": "torch", "hardly": "dense", "unknown": "numba"}
    assert [layer.backend for layer in layers.values()] == ["torch", "dense", "numba"]


def test_a_large_layer_never_has_a_dense_weight(monkeypatch):
    layer = SparseLinear(16, 12, 20)
    assert ways(layer)[-1] == "dense"
    monkeypatch.setattr("lightning_sparse.storage.measure.LAYER_LIMIT", 16 * 12 * 4 - 1)
    assert "dense" not in ways(layer)


def test_a_resumed_run_computes_as_the_checkpoint_says(tmp_path, monkeypatch):
    path = tmp_path / "one.ckpt"
    monkeypatch.setattr(layer_backends, "measure_all", measured(TIMES))
    fit([METHODS["SET"](storage="sparse"), SavesFirst(path)])
    monkeypatch.setattr(layer_backends, "measure_all", measured({"numba": 0.1, "torch": 0.4, "dense": 1.0}))
    looks = Ways()
    trainer([METHODS["SET"](storage="sparse"), looks]).fit(seeded(Lit), loader(), ckpt_path=path)
    assert looks.first == looks.last == ["torch"] * 3
    fit([METHODS["SET"](storage="sparse"), looks], max_epochs=1)
    assert looks.last == ["numba"] * 3, "another fit measures again"
    monkeypatch.setattr(layer_backends, "backends", lambda layer: ["numba"])
    with pytest.warns(UserWarning, match=r"the backend 'torch' for net\.0\.weight, which is not available here"):
        trainer([METHODS["SET"](storage="sparse"), looks]).fit(seeded(Lit), loader(), ckpt_path=path)
    assert looks.last == ["numba"] * 3


def test_checkpoints_of_earlier_versions_have_one_backend_for_all_layers():
    store = METHODS["SET"](storage="sparse").store
    store.load_state_dict({"weights": {"a.weight": {}, "b.weight": {}}, "backend": "torch"})
    assert store.backends.chosen == {"a.weight": "torch", "b.weight": "torch"}
    store.load_state_dict({"weights": {"a.weight": {}}, "backend": ""})
    assert store.backends.chosen == {}


@pytest.mark.parametrize("how", ["deterministic", "asked"])
def test_nothing_is_measured_where_one_backend_is_asked_for(how, monkeypatch):
    monkeypatch.setattr(layer_backends, "measure_all", None)
    if how == "asked":
        monkeypatch.setattr(dispatch, "wanted", lambda: "torch")
        monkeypatch.setattr(dispatch, "module", lambda *_: None)
    looks = Ways()
    try:
        fit([RandomPruning(0.8, storage="sparse"), looks], max_epochs=1, deterministic=how == "deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    assert looks.first == looks.last == [("numba" if how == "deterministic" else "torch")] * 3


def test_a_layer_that_the_first_batch_does_not_use_computes_as_is_quicker_as_a_rule(monkeypatch):
    monkeypatch.setattr(layer_backends, "measure_all", measured(TIMES))

    class Skips(Lit):
        def forward(self, x):
            return self.net[4](x[:, :10])

    looks = Ways()
    module = seeded(Skips)
    fit([RandomPruning(0.8, storage="sparse"), looks], module, max_epochs=1)
    assert looks.last == ["numba", "numba", "torch"]


def test_an_exception_in_the_first_batch_leaves_no_hook(monkeypatch):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step or self.net[0]._forward_pre_hooks:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    module, callback = seeded(Fails), RandomPruning(0.8, storage="sparse")
    monkeypatch.setattr(compare, "difference", lambda *_: None)
    with pytest.raises(RuntimeError, match="stop"):
        fit(callback, module)
    callback.setup(SimpleNamespace(current_epoch=0, global_step=0), module, "test")
    assert not module.net[0]._forward_pre_hooks
