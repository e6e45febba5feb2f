"""What is logged: names, values and how often, in real files."""

import csv

import pytest
import torch
from helpers import SETTINGS, Lit, fit, loader, seeded
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

NAMES = ["net.0.weight", "net.2.weight", "net.4.weight"]
MORE = {"DFBST": ["sparsity/backward"], "AutoSparse": ["sparsity/alpha", "sparsity/backward"]}


def rows(folder, key="sparsity/model"):
    """Return the rows of a CSV log that hold ``key``."""
    with open(next(folder.rglob("metrics.csv"))) as lines:
        return [row for row in csv.DictReader(lines) if row.get(key)]


@pytest.mark.parametrize("method", SETTINGS)
def test_sparsity_is_logged_once_an_epoch_by_weight_and_whole(method, tmp_path):
    callback = SETTINGS[method]()
    fit(callback, logger=CSVLogger(tmp_path), max_epochs=3)
    logged = rows(tmp_path)
    assert [int(row["epoch"]) for row in logged] == [0, 1, 2]
    assert float(logged[-1]["sparsity/model"]) == pytest.approx(callback.sparsity)
    for name in NAMES:
        assert float(logged[-1][f"sparsity/{name}"]) == pytest.approx(1 - callback.layer_density[name])
    assert all(logged[-1][key] for key in MORE.get(method, []))


def test_backward_sparsity_and_alpha_have_their_values(tmp_path):
    callback = SETTINGS["DFBST"]()
    fit(callback, logger=CSVLogger(tmp_path / "dfbst"))
    last = rows(tmp_path / "dfbst")[-1]
    assert 0 < callback.backward_density < 1
    assert float(last["sparsity/backward"]) == pytest.approx(1 - callback.backward_density)

    callback = SETTINGS["AutoSparse"](decay="linear", backward_density=0.8)
    fit(callback, logger=CSVLogger(tmp_path / "autosparse"), max_epochs=3)
    logged = rows(tmp_path / "autosparse")
    assert [float(row["sparsity/alpha"]) for row in logged] == pytest.approx([0.6, 0.4, 0.2])
    assert float(logged[-1]["sparsity/backward"]) == pytest.approx(1 - max(0.8, callback.density))


def test_steps_are_logged_on_request(tmp_path):
    fit(
        SETTINGS["DST"](log_every_n_steps=10),
        logger=CSVLogger(tmp_path),
        max_epochs=1,
        log_every_n_steps=10,
    )
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert [step + 1 for step in steps] == [10, 20, 30, 30]  # 30 batches, and the end of the epoch


def test_tensorboard_receives_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = SETTINGS["DST"]()
    fit(callback, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    assert events.Scalars("sparsity/model")[-1].value == pytest.approx(callback.sparsity)
    assert {f"sparsity/{name}" for name in NAMES} <= set(events.Tags()["scalars"])


def test_nothing_is_logged_without_a_logger():
    _, run = fit(SETTINGS["DST"](log_every_n_steps=1), logger=False)
    assert not [key for key in run.callback_metrics if key.startswith("sparsity")]


def test_a_checkpoint_can_be_chosen_by_sparsity(tmp_path):
    callback = SETTINGS["DST"]()
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="sparsity/model", mode="max")
    fit(
        [callback, keeper],
        module=seeded(Lit),
        train=loader(),
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        max_epochs=3,
    )
    best = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
    zeros = sum(int((best[name] == 0).sum()) for name in NAMES) / sum(best[name].numel() for name in NAMES)
    assert zeros == pytest.approx(max(float(row["sparsity/model"]) for row in rows(tmp_path)))
