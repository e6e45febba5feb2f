"""SparsityMonitor: what it says is so, and the run beside it is the one without it."""

import copy
import csv
import json
import pickle
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import monitor_ranks
import pytest
import torch
from helpers import PLAINLY, SETTINGS, Lit, cnn, data, fit, loader, same, saved, seeded, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from processes import run_fresh_ranks
from torch import nn

from lightning_sparse import DST, ITOP, SET, RandomPruning, RigL, SparsityMonitor
from lightning_sparse.accounting.flops import dense_flops, training
from lightning_sparse.accounting.masks import mask_bits
from lightning_sparse.monitor.figures import draw

LAYERS = {"net.0.weight": (16, 12), "net.2.weight": (10, 16), "net.4.weight": (4, 10)}
SIZE = 392


def written(run):
    return json.loads(Path(run.log_dir, "sparsity.json").read_text())


def watched(callbacks, folder, module=None, train=None, **options):
    module, run = fit(callbacks, module, train, logger=CSVLogger(folder), **options)
    return module, run, written(run)


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("method", ["DST", "DFBST", "TopKAST", "OptG", "RigL", "SNIP", None])
def test_the_file_says_what_the_method_holds(method, tmp_path):
    callback = SETTINGS[method]() if method else None
    callbacks = [SparsityMonitor(every_n_batches=4), *([callback] if callback else [])]
    _, _, found = watched(callbacks, tmp_path)
    assert (found["format"], found["status"]) == (1, "finished")
    assert found["method"] == (callback and {"name": method, "arguments": json.loads(json.dumps(callback.arguments))})
    assert found["module"] == "helpers.Lit"
    assert {layer["name"]: tuple(layer["shape"]) for layer in found["layers"]} == LAYERS
    assert [layer["dense_forward_flops"] for layer in found["layers"]] == [2 * 192, 2 * 160, 2 * 40]
    assert sum(layer["size"] for layer in found["layers"]) + found["other_parameters"] == 392 + 30
    assert found["hardware"]["processes"] == 1
    assert [(epoch["epoch"], epoch["step"]) for epoch in found["epochs"]] == [(0, 30), (1, 60)]
    last = found["epochs"][-1]
    density = callback.layer_density if callback else dict.fromkeys(LAYERS, 1.0)
    assert {name: layer["density"] for name, layer in last["layers"].items()} == density
    active = sum(round(density[name] * out * n) for name, (out, n) in LAYERS.items())
    assert last["density"] == pytest.approx(active / SIZE)
    assert last["inference_flops"] == pytest.approx(active / SIZE)
    assert last["backward_density"] == pytest.approx(callback.gradient_density if callback else 1.0)
    assert last["step_time_s"] > 0
    assert last["peak_memory_bytes"] > 2**20
    assert last["bytes"]["optimizer_state"] >= 422 * 4
    for name, picture in found["masks"].items():
        mask = callback.masks[name] if callback else torch.ones(LAYERS[name])
        assert (picture["rows"], picture["columns"]) == LAYERS[name]
        assert torch.equal(torch.tensor(picture["density"]), mask.float())
        assert last["layers"][name]["empty_neurons"] == int((mask.sum(1) == 0).sum())
        assert last["layers"][name]["empty_inputs"] == int((mask.sum(0) == 0).sum())
        assert last["layers"][name]["shrunk_size"] == int(mask.any(1).sum() * mask.any(0).sum())
    for key, totals in (
        ("empty_neurons", [out for out, _ in LAYERS.values()]),
        ("empty_inputs", [n for _, n in LAYERS.values()]),
        ("shrunk_size", [out * n for out, n in LAYERS.values()]),
    ):
        assert last[key] == pytest.approx(sum(layer[key] for layer in last["layers"].values()) / sum(totals))
    assert (last["churn"] is None) == (last["exploration"] is None) == (method is None)
    backward = {f"{name}/backward" for name in LAYERS} if method == "DFBST" else set()
    assert set(last["thresholds"]) == (set(LAYERS) | backward if method in ("DST", "DFBST") else set())
    if method == "DFBST":
        for name, t in (("net.0.weight", callback.thresholds), ("net.0.weight/backward", callback.backward_thresholds)):
            largest = t["net.0.weight"].abs().max()
            assert last["thresholds"][name]["max"] == pytest.approx(float(largest))
        assert sum(last["thresholds"]["net.0.weight"]["counts"]) == 16


def test_what_a_run_costs_does_not_depend_on_its_precision(tmp_path):
    runs = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        _, _, run = watched([SparsityMonitor(), RigL(0.8, update_every=7)], tmp_path / precision, precision=precision)
        runs[precision] = [run["dense_forward_flops"], run["epochs"][-1]["inference_flops"]]
    assert runs["bf16-mixed"] == runs["bf16-true"] == runs["32-true"]
    assert runs["32-true"][1] == pytest.approx(0.2, abs=1e-2)


def test_two_methods_share_one_file(tmp_path):
    pair = [DST(alpha=5e-3, exclude=["net.0.*"]), SparsityMonitor(), SET(0.8, include=["net.0.*"])]
    _, _, found = watched(pair, tmp_path)
    assert found["method"]["name"] == "DST + SET"
    assert found["method"]["arguments"]["SET"]["sparsity"] == 0.8
    density = {**pair[0].layer_density, **pair[2].layer_density}
    assert {name: layer["density"] for name, layer in found["epochs"][-1]["layers"].items()} == density


def test_metrics_that_are_logged_after_it_are_in_the_file_too(tmp_path):
    class Late(Lit):
        def on_train_epoch_end(self):
            self.log("late", float(self.current_epoch))
            self.log("lost", float("nan"))

    _, _, found = watched([SparsityMonitor(), DST(alpha=5e-3)], tmp_path, seeded(Late))
    assert [epoch["metrics"]["late"] for epoch in found["epochs"]] == [0.0, 1.0]
    assert found["epochs"][0]["metrics"]["lost"] is None
    assert "sparsity/model" in found["epochs"][0]["metrics"]


@pytest.mark.parametrize(("error", "raised", "status"), [(ValueError, ValueError, "failed"),
                                                         (KeyboardInterrupt, SystemExit, "interrupted")])  # fmt: skip
def test_a_run_that_breaks_off_says_so(error, raised, status, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # which Lightning leaves deaf to a second interruption

    class Broken(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 40:
                raise error
            return super().training_step(batch, batch_idx)

    run = trainer([SparsityMonitor(), DST(alpha=5e-3)], logger=CSVLogger(tmp_path))
    with pytest.raises(raised):
        run.fit(seeded(Broken), loader())
    found = written(run)
    assert (found["status"], len(found["epochs"])) == (status, 1)


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "lightning_logs").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot write .*sparsity.json"):
        _, run = fit(SparsityMonitor(), default_root_dir=tmp_path / "lightning_logs" / "sub")
    assert run.state.finished


# ---------------------------------------------------------------------- no trace in the run


class Random(Lit):
    """Draws in the step, keeps batch statistics and state of its own."""

    def __init__(self):
        super().__init__(nn.Sequential(cnn(), nn.Dropout(0.3)))
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        batch[0].mul_(1 + 0.01 * torch.randn(()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["DFBST", "RigL", None])
def test_training_is_the_same_bit_for_bit(method, tmp_path):
    ends = []
    for before, after in (((), ()), ((SparsityMonitor(3),), ()), ((), (SparsityMonitor(3),))):
        callbacks = [*before, *([SETTINGS[method]()] if method else []), *after]
        module, run = fit(callbacks, seeded(Random), loader(48), logger=CSVLogger(tmp_path))
        optimizer = run.optimizers[0].state_dict()["state"]
        ends.append([module.state_dict(), optimizer, torch.get_rng_state(), torch.tensor(module.seen)])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_what_it_says_does_not_depend_on_its_place(tmp_path):
    found = []
    for order in (1, -1):
        callbacks = [SparsityMonitor(every_n_batches=4), DST(alpha=5e-3)][::order]
        _, _, file = watched(callbacks, tmp_path)
        for epoch in file["epochs"]:
            del epoch["step_time_s"], epoch["peak_memory_bytes"]
        found.append((file["epochs"], file["masks"], file["layers"]))
    assert found[0] == found[1]


# ---------------------------------------------------------------------- operations, exploration, churn


def shares(module, density, gradient):
    x, y = data(8)
    flops = dense_flops(module, lambda: nn.functional.cross_entropy(module(x), y))
    return training(flops, density, gradient) / training(flops, {}, {})


@pytest.mark.parametrize("every", [1, 5, 1000])
def test_rigl_pays_a_dense_weight_gradient_at_each_update(every, tmp_path):
    callback = RigL(0.8, update_every=10, stop_at=1.0)
    module, _, found = watched([SparsityMonitor(every), callback], tmp_path, max_epochs=1)
    sparse = shares(module, callback.layer_density, callback.layer_density)
    update = shares(module, callback.layer_density, {})
    # steps 10 and 20 of 0 to 29 move connections
    assert found["epochs"][0]["training_flops"] == pytest.approx((28 * sparse + 2 * update) / 30)
    # all that is dropped is another than what is grown
    assert 0 < found["epochs"][0]["churn_per_update"] <= 0.3


def test_a_dense_run_costs_what_dense_runs_cost(tmp_path):
    _, _, found = watched([SparsityMonitor()], tmp_path)
    assert [epoch["training_flops"] for epoch in found["epochs"]] == [1.0, 1.0]


def test_exploration_is_that_of_itop(tmp_path):
    callback = ITOP(0.9, update_every=7)
    _, _, found = watched([SparsityMonitor(every_n_batches=1000), callback], tmp_path)
    assert found["epochs"][-1]["exploration"] == callback.exploration_rate > 0.1


def test_a_fixed_mask_does_not_change(tmp_path):
    callback = RandomPruning(0.75)
    _, _, found = watched([callback, SparsityMonitor()], tmp_path)
    assert [epoch["churn"] for epoch in found["epochs"]] == [0, 0]
    assert found["epochs"][-1]["exploration"] == callback.density
    assert found["epochs"][-1]["churn_per_update"] is None


def test_churn_of_an_epoch_compares_its_ends(tmp_path):
    ends = []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append({name: mask.clone() for name, mask in callback.masks.items()})

    callback = SET(0.8, update_every=7, stop_at=1.0)
    _, _, found = watched([callback, SparsityMonitor(), Keep()], tmp_path)
    different = sum(int((mask ^ ends[1][name]).sum()) for name, mask in ends[0].items())
    assert found["epochs"][1]["churn"] == different / sum(2 * int(mask.sum()) for mask in ends[0].values()) > 0


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_storage_shows_in_the_bytes_not_in_the_operations(storage, tmp_path):
    callback = SET(0.75, update_every=7, storage=storage)
    _, _, found = watched([SparsityMonitor(), callback], tmp_path, max_epochs=1)
    (last,) = found["epochs"]
    assert [layer["dense_forward_flops"] for layer in found["layers"]] == [2 * 192, 2 * 160, 2 * 40]
    assert [layer["dense_input_gradient_flops"] for layer in found["layers"]] == [0, 2 * 160, 2 * 40]
    assert last["density"] == 98 / SIZE
    stored = 98 if storage == "sparse" else SIZE
    assert last["bytes"]["weights"] == last["bytes"]["gradients"] == 4 * (stored + 30)
    assert last["bytes"]["optimizer_state"] == 4 * (stored + 30)
    assert last["bytes"]["method"] == (0 if storage == "sparse" else SIZE)


def test_what_cannot_be_counted_is_left_open(tmp_path):
    class Manual(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="could not count the operations of Manual .*it optimizes manually"):
        _, _, found = watched([SparsityMonitor(), DST(alpha=5e-3)], tmp_path, seeded(Manual))
    assert found["epochs"][-1]["inference_flops"] is found["epochs"][-1]["training_flops"] is None
    assert found["layers"][0]["dense_forward_flops"] is None
    assert found["epochs"][-1]["density"] < 1


# ---------------------------------------------------------------------- loggers


def test_csv_gets_the_record_and_the_progress_bar_the_density(tmp_path):
    callback = DST(alpha=5e-3)
    _, run, found = watched([SparsityMonitor(), callback], tmp_path)
    lines = Path(run.log_dir, "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["flops/inference"]]
    assert [int(row["step"]) for row in rows] == [29, 59]
    last = found["epochs"][-1]
    assert not [name for name in rows[0] if name.startswith("density/")], "methods log their sparsity"
    assert float(rows[-1]["flops/training"]) == last["training_flops"]
    assert float(rows[-1]["empty_neurons/net.0.weight"]) == last["layers"]["net.0.weight"]["empty_neurons"]
    assert float(rows[-1]["threshold/net.0.weight"]) == last["thresholds"]["net.0.weight"]["mean"]
    assert float(run.progress_bar_metrics["density/model"]) == pytest.approx(last["density"])


def test_tensorboard_gets_scalars_and_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    logger = TensorBoardLogger(tmp_path)
    callback = DST(alpha=5e-3)
    fit([callback, SparsityMonitor(figures=True)], logger=logger)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("sparsity/model")[-1].value == pytest.approx(callback.sparsity)
    for name in ("monitor/density", "monitor/masks"):
        images = events.Images(name)
        assert [image.step for image in images] == [30, 60]
        assert images[-1].encoded_image_string.startswith(b"\x89PNG")


def test_values_of_layers_are_logged_only_if_asked_for(tmp_path):
    callback = DST(alpha=5e-3, log_layers=False)
    _, run, found = watched([SparsityMonitor(log_layers=False), callback], tmp_path)
    (names, *_) = csv.reader(Path(run.log_dir, "metrics.csv").read_text().splitlines())
    assert [name for name in names if "net." in name] == []
    assert {"sparsity/model", "mask/empty_neurons"} <= set(names)
    assert found["epochs"][-1]["layers"].keys() == callback.layer_density.keys()


def test_bars_of_densities_have_numbers():
    text = pytest.importorskip("matplotlib.text")
    cells = {"rows": 2, "columns": 2, "cells": torch.eye(2)}
    (axes,) = draw({"a": 0.125, "b": 1.0}, {"a": cells, "b": cells})["density"].axes
    assert {"0.125", "1"} <= {found.get_text() for found in axes.findobj(match=text.Text)}


def test_moves_of_connections_are_counted(tmp_path):
    _, _, found = watched([SparsityMonitor(), RigL(0.8, update_every=7)], tmp_path)
    assert [epoch["updates"] for epoch in found["epochs"]] == [4, 5], "the sixth would move less than one connection"
    _, _, found = watched([SparsityMonitor(), DST(alpha=5e-3)], tmp_path, max_epochs=1)
    assert found["epochs"][0]["updates"] is None


def test_figures_without_anyone_to_take_them_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="draws for loggers that take figures"):
        fit(SparsityMonitor(figures=True), logger=CSVLogger(tmp_path), max_epochs=1)


# ---------------------------------------------------------------------- alarms


def alarms(monitor, callback, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([monitor, callback], **options)
    return [str(w.message) for w in caught if "collaps" in str(w.message) or "no weight left" in str(w.message)]


def test_a_collapsing_layer_is_named_once(tmp_path):
    masks = RandomPruning(0.5, distribution={"net.2.weight": 9 / 160})
    found = alarms(SparsityMonitor(every_n_batches=1), masks, default_root_dir=tmp_path)
    (message,) = found
    assert message.startswith(
        "net.2.weight is collapsing: 9 of its 160 weights are left after step 0, fewer than its 10"
    )


def test_the_alarm_has_a_bound_of_ones_choice(tmp_path):
    masks = RandomPruning(0.5, distribution={"net.2.weight": 0.2})
    assert alarms(SparsityMonitor(), masks, default_root_dir=tmp_path) == []
    (message,) = alarms(SparsityMonitor(collapse_below=0.3), masks, default_root_dir=tmp_path)
    assert "net.2.weight is collapsing" in message
    assert "a density below 0.3" in message


def test_a_layer_without_any_weight_is_left_to_the_methods_own_warning(tmp_path):
    masks = RandomPruning(0.5, distribution={"net.2.weight": 0.0})
    (message,) = alarms(SparsityMonitor(), masks, default_root_dir=tmp_path)
    assert "net.2.weight has no weight left" in message


# ---------------------------------------------------------------------- resume, copies, processes


@pytest.mark.parametrize("method", ["DST", "RigL"])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(method, tmp_path):
    _, _, whole = watched([SparsityMonitor(4), SETTINGS[method]()], tmp_path, seeded(Lit), max_epochs=3)

    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    watched([SETTINGS[method](), SparsityMonitor(4), keep], tmp_path, seeded(Lit), **options)
    middle = tmp_path / "kept" / "epoch=1.ckpt"
    state = torch.load(middle, weights_only=True)["callbacks"]["SparsityMonitor"]
    assert state["explored"]["bits"]["net.0.weight"].dtype == torch.uint8
    run = trainer([SETTINGS[method](), SparsityMonitor(4)], logger=CSVLogger(tmp_path), max_epochs=3)
    run.fit(seeded(Lit), loader(), ckpt_path=middle, **PLAINLY)
    resumed = written(run)
    assert [epoch["epoch"] for epoch in resumed["epochs"]] == [0, 1, 2]
    for key in ("density", "training_flops", "churn", "churn_per_update", "exploration", "layers"):
        assert resumed["epochs"][-1][key] == whole["epochs"][-1][key], key
    assert resumed["wall_time_s"] > state["wall_time_s"] > 0


def test_a_checkpoint_without_its_state_is_gone_on_from(tmp_path):
    _, run = fit(DST(alpha=5e-3), seeded(Lit))
    saved(run, tmp_path / "plain.ckpt")
    run = trainer([DST(alpha=5e-3), SparsityMonitor()], logger=CSVLogger(tmp_path), max_epochs=3)
    run.fit(seeded(Lit), loader(), ckpt_path=tmp_path / "plain.ckpt")
    found = written(run)
    assert found["from_step"] == 60
    assert [epoch["epoch"] for epoch in found["epochs"]] == [2]


def test_a_run_that_goes_on_without_its_method_is_told_to_be_dense(tmp_path):
    _, run, _ = watched([SETTINGS["RigL"](), SparsityMonitor()], tmp_path, seeded(Lit), max_epochs=1)
    saved(run, tmp_path / "sparse.ckpt")
    run = trainer([SparsityMonitor()], logger=CSVLogger(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match=r"net\.0\.weight, net\.2\.weight, net\.4\.weight trained sparse\. No method"):
        run.fit(seeded(Lit), loader(), ckpt_path=tmp_path / "sparse.ckpt")
    before, after = written(run)["epochs"]
    assert (before["density"], after["density"]) == (pytest.approx(0.2, abs=0.01), 1.0)


def test_a_second_fit_begins_anew_and_copies_are_plain(tmp_path):
    monitor = SparsityMonitor()
    for _ in range(2):
        _, _, found = watched([monitor, SET(0.8)], tmp_path)
        assert [epoch["epoch"] for epoch in found["epochs"]] == [0, 1]
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert same(twin.state_dict()["explored"], monitor.state_dict()["explored"])


def test_processes_agree_and_one_writes(tmp_path):
    run_fresh_ranks(monitor_ranks.run_all, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["epochs"] == second["epochs"]
    assert same(first["bits"], second["bits"])
    (file,) = tmp_path.rglob("sparsity.json")
    found = json.loads(file.read_text())
    assert (found["status"], found["hardware"]["processes"], len(found["epochs"])) == ("finished", 2, 2)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches must be an integer of at least 1, got 0"),
        ({"collapse_below": 2}, "collapse_below must be a number from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityMonitor(**arguments)


def test_figures_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-sparse\[report\]'"):
        SparsityMonitor(figures=True)


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_knows_its_arguments(method):
    arguments = SETTINGS[method]().arguments
    assert json.loads(json.dumps(arguments)) == arguments
    assert arguments.get("sparsity") in (0.8, None)


def test_bits_keep_the_order_of_elements():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    assert mask_bits(mask).tolist() == [2, 2]
    layout = mask.view(1, 2, 5, 1).to(memory_format=torch.channels_last)
    assert mask_bits(layout).tolist() == [2, 2]
