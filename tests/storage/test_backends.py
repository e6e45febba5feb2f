"""Who multiplies in sparse layers: the quicker of the backends, measured at the start of a fit."""

import itertools
import warnings

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
from stored import METHODS, TIMES

import lightning_sparse.storage.sparse as training
from lightning_sparse import RandomPruning
from lightning_sparse.kernels import convolutions_numba, dispatch, products_numba
from lightning_sparse.storage import SparseConv2d, SparseLinear
from lightning_sparse.storage.measure import measure


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
    numba = {"products": products_numba, "convolutions": convolutions_numba}
    monkeypatch.setattr(dispatch, "module", lambda kind, _: None if backends == ["torch"] else numba[kind])
    monkeypatch.setattr(dispatch, "wanted", lambda: "numba" if backends == ["numba"] else "auto")
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
