"""Scalars reach any logger through the module's own log."""

import csv
import warnings

import pytest
import torch
from helpers import REPRESENTATIVES, SETTINGS, Lit, fit, has_fresh, loader, seeded, trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sparse import DST, RandomPruning

LAYERS = ["net.0.weight", "net.2.weight", "net.4.weight"]


def rows(folder):
    (path,) = folder.rglob("metrics.csv")
    return [row for row in csv.DictReader(path.open()) if row.get("sparsity/model")]


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


@pytest.mark.parametrize("method", [*REPRESENTATIVES, "AutoSparse", "DSR", "ITOP", "SWAT"])
def test_once_an_epoch_by_default_with_the_values_of_that_moment(method, tmp_path):
    callback = SETTINGS[method]()
    fit(callback, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=3)
    logged = rows(tmp_path)
    assert [int(row["epoch"]) for row in logged] == [0, 1, 2]
    names = {name for name in logged[0] if name.startswith("sparsity/")}
    layers = {f"sparsity/{layer}" for layer in LAYERS}
    assert names == {"sparsity/model", "sparsity/module"} | layers | set(callback.extra_metrics)
    last = {name: float(logged[-1][name]) for name in names}
    assert last["sparsity/model"] == pytest.approx(callback.sparsity, abs=1e-6)
    assert 0 < last["sparsity/model"] < 1
    assert last["sparsity/module"] == pytest.approx(callback.sparsity * 392 / 422, abs=1e-6), "30 are biases"
    for layer in LAYERS:
        assert last[f"sparsity/{layer}"] == pytest.approx(1 - callback.layer_density[layer], abs=1e-6)
    if method == "DFBST":
        assert last["sparsity/backward"] == pytest.approx(1 - callback.backward_density, abs=1e-6)
    if method == "AutoSparse":
        assert last["sparsity/alpha"] == pytest.approx(callback.current_alpha, abs=1e-6)


def test_the_models_sparsity_is_that_of_all_methods_together(tmp_path):
    first = RandomPruning(0.9, include=["net.0.weight"], log_every_n_steps=1)
    second = DST(5e-3, exclude=["net.0.weight"], log_every_n_steps=1)
    module, _ = fit([first, second], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    weights = [module.get_parameter(name) for name in LAYERS]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    logged = rows(tmp_path)
    assert float(logged[-1]["sparsity/model"]) == pytest.approx(zeros, abs=1e-6)
    assert float(logged[-1]["sparsity/module"]) == pytest.approx(zeros * 392 / 422, abs=1e-6)
    assert len({row["sparsity/net.2.weight"] for row in logged}) > 2


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_tensorboard_gets_them_too(method, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    callback = SETTINGS[method]()
    fit(callback, logger=logger)
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = events.Scalars("sparsity/model")
    assert len(scalars) == 2
    assert scalars[-1].value == pytest.approx(callback.sparsity, abs=1e-6)
    assert {f"sparsity/{layer}" for layer in LAYERS} | set(callback.extra_metrics) <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_also_every_so_many_steps_if_asked_for(method, accumulate, tmp_path):
    class Knows(SETTINGS[method]().__class__):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            known.setdefault(trainer.global_step, self.sparsity)

    known = {}
    callback = SETTINGS[method](log_every_n_steps=5)
    callback.__class__ = Knows
    options = {"log_every_n_steps": 5, "accumulate_grad_batches": accumulate, "max_epochs": 2}
    fit(callback, logger=CSVLogger(tmp_path), **options)
    steps = 60 // accumulate
    logged = {int(row["step"]) + 1: float(row["sparsity/model"]) for row in rows(tmp_path)}
    ends = {steps // 2, steps}
    assert set(logged) == set(range(5, steps + 1, 5)) | ends
    for step, value in logged.items():
        assert value == pytest.approx(known[step], abs=1e-6)


def test_manual_optimization_with_several_steps_a_batch_misses_none(tmp_path):
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(3):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    class Knows(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            known[batch_idx] = callback.sparsity

    known, callback = {}, SETTINGS["DST"](log_every_n_steps=10)
    logger = CSVLogger(tmp_path)
    fit([callback, Knows()], seeded(Manual), logger=logger, log_every_n_steps=1, max_epochs=1)
    logged = {int(row["step"]): float(row["sparsity/model"]) for row in rows(tmp_path)}
    # the batches that pass a multiple of 10 among the 90 steps; in between the Trainer repeats the latest value
    passing = [3, 6, 9, 13, 16, 19, 23, 26, 29]
    assert sorted(logged) == list(range(3, 30))
    for batch, value in logged.items():
        assert value == pytest.approx(known[max(p for p in passing if p <= batch)], abs=1e-6)
    assert len(set(logged.values())) > 3


def test_an_interval_that_the_trainer_would_swallow_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match=r"log_every_n_steps=5 of DST.* is not a multiple of the Trainer's 50.*Set Trainer"
    ):
        fit(SETTINGS["DST"](log_every_n_steps=5), logger=CSVLogger(tmp_path), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no multiple")
        fit(SETTINGS["DST"](log_every_n_steps=10), logger=CSVLogger(tmp_path), log_every_n_steps=5, max_epochs=1)
        fit(SETTINGS["DST"](log_every_n_steps=5), max_epochs=1)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_nothing_is_logged_without_a_logger(method):
    for every in (None, 1):
        _, run = fit(SETTINGS[method](log_every_n_steps=every), logger=False, max_epochs=1)
        assert [name for name in run.callback_metrics if name.startswith("sparsity/")] == []
        assert run.logged_metrics == {}


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_other_callbacks_can_monitor_sparsity(method, validate, tmp_path):
    best = ModelCheckpoint(
        tmp_path, "{epoch}-{sparsity/model:.3f}", "sparsity/model", mode="max", save_on_train_epoch_end=True
    )
    stop = EarlyStopping("sparsity/model", mode="max", patience=50, check_on_train_epoch_end=True)
    callback = SETTINGS[method]()
    run = trainer([callback, best, stop], logger=CSVLogger(tmp_path), enable_checkpointing=True, max_epochs=3)
    run.fit(seeded(Lit), loader(), *([loader(16)] if validate else []))
    values = [float(row["sparsity/model"]) for row in rows(tmp_path)]
    assert len(values) == 3
    assert float(best.best_model_score) == pytest.approx(max(values), abs=1e-6)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    zeros = sum(int((state[layer] == 0).sum()) for layer in LAYERS) / sum(state[layer].numel() for layer in LAYERS)
    assert zeros == pytest.approx(max(values), abs=1e-6) or (zeros > max(values) and has_fresh(callback))
