"""``lightning-sparse compare``: what is planned, trained, read, put into the table and drawn."""

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from processes import PATIENCE

import lightning_sparse
from lightning_sparse import cli
from lightning_sparse.compare import command, figure, plan, results, runs
from lightning_sparse.compare.recipe import Recipe

DIGITS = "dense-lenet300-digits"
OWN_DENSITY = {"DST", "DFBST", "AutoSparse", "STR"}


def own_recipe(folder, callbacks, **more):
    """Write a user's recipe, here of digits, with callbacks."""
    content = yaml.safe_load(lightning_sparse.zoo.recipes.path(DIGITS).read_text())
    content["trainer"]["callbacks"] = callbacks
    content.update(more)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def entries(methods, sparsities=None, recipe=DIGITS):
    return plan.entries(methods, sparsities, Recipe.read(recipe))


def lines_of(run, attempt, rows):
    """Write ``metrics.csv`` of an attempt."""
    folder = run / f"version_{attempt}"
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return folder


# ---------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("recipe", [DIGITS, "dense-lenet300-mnist"])
def test_every_method_of_the_package_is_known_and_planned_whatever_the_case(recipe):
    known = [name for name in lightning_sparse.__all__ if name in plan.methods()]
    assert {"DFBST", "RigL", "GGR", "MemoryEfficientDST", *OWN_DENSITY} <= set(known)
    found = entries(",".join(["DENSE", *map(str.upper, known)]), [0.8, 0.9], recipe)
    assert [entry.method for entry in found] == ["dense"] + [n for n in known for _ in range(2 - (n in OWN_DENSITY))]
    for entry in found[1:]:
        own = entry.method in OWN_DENSITY
        assert entry.sparsity is None if own else entry.sparsity == entry.arguments["sparsity"]
        getattr(lightning_sparse, entry.method)(**entry.arguments)


def test_hyphens_and_underscores_in_names_do_not_count():
    assert [e.method for e in entries("memory_efficient-dst,lottery-ticket")] == ["MemoryEfficientDST", "LotteryTicket"]


def test_arguments_are_yaml_and_brackets_protect_commas_and_colons():
    (entry, _) = entries("rigl:drop_fraction=2e-1:update_every=null:exclude=['fc3:w',fc1.weight],dense", [0.5])
    exclude = ["fc3:w", "fc1.weight"]
    assert entry.arguments == {"drop_fraction": 0.2, "update_every": None, "exclude": exclude, "sparsity": 0.5}
    assert entry.title == "RigL drop_fraction=0.2 update_every=None exclude=['fc3:w', 'fc1.weight']"


def test_arguments_that_are_not_written_come_from_the_methods_recipe_for_the_network():
    digits, mnist = (entries("dfbst:beta=0.5", recipe=f"dense-lenet300-{d}")[0] for d in ("digits", "mnist"))
    assert digits.arguments == {"alpha": 3e-3, "beta": 0.5}
    assert mnist.arguments == {"alpha": 5e-4, "beta": 0.5}


def test_what_the_methods_recipe_sets_beside_its_callback_is_told_with_the_way_to_have_it():
    said = []
    plan.entries("str", None, Recipe.read(DIGITS), said.append)
    key = "model.init_args.optimizer.init_args.weight_decay=0.01"
    assert said == [
        "STR: init_threshold=-5.0, as in the recipe str-lenet300-digits",
        f"STR: str-lenet300-digits also sets {key}, which is not taken over; to do so, add :{key}",
    ]
    (entry,) = plan.entries(f"str:{key}:init_threshold=-4", None, Recipe.read(DIGITS), said.append)
    assert (entry.options, len(said)) == ((key,), 2)


def test_sparsities_go_to_methods_that_take_one_and_were_given_none():
    found = entries("dst,set,rigl:sparsity=0.7", [0.8, 0.95])
    assert [(e.method, e.sparsity) for e in found] == [("DST", None), ("SET", 0.8), ("SET", 0.95), ("RigL", 0.7)]
    assert [e.sparsity for e in entries("set")] == [0.9]


def test_the_backward_density_of_topkast_is_twice_its_density_unless_given():
    assert [e.arguments["backward_sparsity"] for e in entries("topkast", [0.9, 0.3])] == [0.8, 0.0]
    assert entries("topkast:backward_sparsity=0.5")[0].arguments["backward_sparsity"] == 0.5


def test_the_recipes_sparse_callback_gives_its_arguments_to_its_method_and_its_choice_of_layers_to_all(tmp_path):
    rigl = {"class_path": "lightning_sparse.RigL", "init_args": {"sparsity": 0.6, "exclude": ["fc3.weight"]}}
    other = "lightning.pytorch.callbacks.LearningRateMonitor"
    recipe = Recipe.read(own_recipe(tmp_path, [{"class_path": other}, rigl]))
    assert (recipe.method, recipe.others) == ("RigL", [{"class_path": other}])
    dense, own, snip = plan.entries("dense,rigl,snip", None, recipe)
    assert dense.arguments == {}
    assert own.arguments == rigl["init_args"]
    assert snip.arguments == {"sparsity": 0.9, "exclude": ["fc3.weight"]}
    assert (own.title, snip.title) == ("RigL", "SNIP")


def test_a_callback_may_stand_alone_or_be_named_without_its_module(tmp_path):
    assert Recipe.read(own_recipe(tmp_path, {"class_path": "DST", "init_args": {"alpha": 1.0}})).method == "DST"
    assert Recipe.read(own_recipe(tmp_path, "LearningRateMonitor")).others == ["LearningRateMonitor"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "rigle"], "no method is named 'rigle'. Near: RigL"),
        (["--methods", "dense:alpha=1"], "dense takes no arguments, got alpha"),
        (["--methods", "dense,"], "no method is named ''"),
        (["--methods", "rigl:update_every"], "'update_every' is not ARGUMENT=VALUE. Write NAME or NAME:ARGUMENT=VALUE"),
        (["--methods", "rigl:decay=none:decay=cosine"], "gives decay twice"),
        (["--methods", "rigl:no_such=1"], "unexpected keyword argument 'no_such'"),
        (["--methods", "rigl:drop_fraction=2"], "drop_fraction must be"),
        (["--methods", "rigl:exclude=[a"], "is not a value in YAML"),
        (["--methods", "dst:sparsity=0.5"], "unexpected keyword argument 'sparsity'"),
        (["--methods", "set", "--sparsities", "1.5"], "sparsity must be a number from 0 to 1, got 1.5"),
        (["--methods", "set", "--sparsities", "a"], "must be numbers separated by commas, got 'a'"),
        (["--methods", "set,set"], "SET at sparsity 0.9 comes twice"),
        (["--methods", "dense", "--recipe", "dense-lenet300-digit"], "no recipe is named 'dense-lenet300-digit'"),
        (["--methods", "dense", "--recipe", "medst/rigl"], "medst/rigl is not a training but adds to one"),
        (["--methods", "dense", "--recipe", "none.yaml"], "there is no file none.yaml"),
        (["--methods", "dense", "--seeds", "0"], "must be an integer of at least 1, got '0'"),
        (["--methods", "dense", "--seeds", "1,1"], "must be a number of seeds, or different seeds such as 0,5"),
        (["--methods", "dense", "--jobs", "none"], "must be an integer of at least 1, got 'none'"),
        (["--methods", "dense", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--methods", "dense", "--epoch=1"], "--epoch=1 is not an option of compare"),
        (["--methods", "dense", "--data.init_args.batch_size", "5"], "with the equals sign"),
        (["--methods", "dense", "--trainer.callbacks+=DST"], "--trainer.callbacks+ is set by compare itself"),
        (["--methods", "dense:trainer.logger=false"], "--trainer.logger is set by compare itself"),
        (["--recipe", DIGITS], "required: --methods"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--recipe", DIGITS, *args])
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_an_argument_that_no_recipe_has_is_asked_for_with_the_syntax(tmp_path):
    recipe = own_recipe(tmp_path, None)
    with pytest.raises(ValueError, match=r"DST needs alpha.* Write dst:alpha=VALUE in --methods"):
        entries("dst", recipe=recipe)
    assert entries("dst:alpha=1e-3", recipe=recipe)[0].arguments == {"alpha": 1e-3}


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"class_path": "lightning_sparse.DST"}, {"class_path": "lightning_sparse.SET"}], "has 2 sparse callbacks"),
        ([{"class_path": "no_such_module.Callback"}], "'no_such_module.Callback' cannot be imported"),
    ],
)
def test_recipes_whose_callbacks_cannot_be_told_apart_are_refused(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message):
        Recipe.read(own_recipe(tmp_path, callbacks))


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("words", "is not the configuration")])
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(str(tmp_path / "bad.yaml"))


# ---------------------------------------------------------------------- numbers


def test_an_epoch_that_two_attempts_have_logged_counts_as_the_later_one_has_it(tmp_path):
    lines_of(tmp_path, 0, [{"epoch": e, "val_acc": e / 10} for e in range(3)])
    lines_of(tmp_path, 9, [{"epoch": 2, "val_acc": 0.5}, {"epoch": 2, "loss": 1}])
    lines_of(tmp_path, 10, [{"epoch": 3, "val_acc": 0.6}])
    assert [epoch["val_acc"] for epoch in results.history(tmp_path)] == [0.0, 0.1, 0.5, 0.6]
    assert results.history(tmp_path)[2] == {"epoch": 2, "val_acc": 0.5, "loss": 1}


def test_numbers_of_a_run_are_those_of_its_log(tmp_path):
    logged = [(0.5, 0.2, 0.1), (0.7, 0.9, 0.3), (0.8, 0.75, 0.4)]
    rows = [
        row
        for epoch, (accuracy, sparsity, backward) in enumerate(logged)
        for row in (
            {"epoch": epoch, "val_acc": accuracy},
            {"epoch": epoch, "sparsity/model": sparsity, "sparsity/backward": backward},
        )
    ]
    lines_of(tmp_path, 0, rows)
    found = results.numbers(tmp_path, "val_acc", "DFBST", None)
    assert found == {
        "metric": 0.8,
        "density": 0.25,
        "backward_density": pytest.approx(0.6),
        "sparsest_density": pytest.approx(0.1),
        "sparsest_metric": 0.7,
    }
    assert set(results.numbers(tmp_path, "val_acc", "RigL", 0.75)) == {"metric", "density", "backward_density"}


def test_costs_come_from_the_monitors_file(tmp_path):
    def monitored(epoch, inference, training, step, memory):
        costs = {"inference_flops": inference, "training_flops": training, "step_time_s": step}
        counts = {"empty_neurons": 0.1 * epoch, "empty_inputs": 0.2 * epoch, "shrunk_size": 1 - 0.1 * epoch}
        return {"epoch": epoch, **counts, **costs, "peak_memory_bytes": memory}

    first = lines_of(tmp_path, 0, [{"epoch": 0, "val_acc": 0.5}])
    second = lines_of(tmp_path, 1, [{"epoch": 2, "val_acc": 0.5}])
    (first / "sparsity.json").write_text(
        json.dumps({"epochs": [monitored(0, 1.0, 1.0, 4e-3, 5), monitored(1, 0.9, 0.9, 9e-3, 7)]})
    )
    (second / "sparsity.json").write_text(
        json.dumps({"epochs": [monitored(1, 0.5, 0.6, 2e-3, 6), monitored(2, 0.25, 0.5, 1e-3, None)]})
    )
    found = results.numbers(tmp_path, "val_acc", "dense", None)
    costs = {"inference_flops": 0.25, "training_flops": 0.5, "step_time_s": 2e-3, "peak_memory_bytes": 6}
    costs |= {"empty_neurons": 0.2, "empty_inputs": 0.4, "shrunk_size": 0.8}
    assert found == {"metric": 0.5, "density": 1.0, **costs}


def test_a_metric_that_was_not_logged_is_refused_with_those_that_were(tmp_path):
    lines_of(tmp_path, 0, [{"epoch": 0, "step": 1, "val_acc": 0.5, "val_loss": 1}])
    with pytest.raises(ValueError, match=r"logged no 'val_f1'. Choose --metric among: val_acc, val_loss."):
        results.numbers(tmp_path, "val_f1", "dense", None)


def test_a_log_that_lacks_the_density_of_the_last_epoch_is_refused(tmp_path):
    lines_of(tmp_path, 0, [{"epoch": 0, "val_acc": 0.5, "sparsity/model": 0.9}, {"epoch": 1, "val_acc": 0.6}])
    with pytest.raises(ValueError, match=r"lacks the density of the last epoch\. Remove the folder"):
        results.numbers(tmp_path, "val_acc", "RigL", 0.9)


ROWS = [
    results.Row("dense", "dense", None, {0: {"metric": 0.97, "density": 1.0}, 1: {"metric": 0.99, "density": 1.0}}),
    results.Row("RigL", "RigL", 0.9, {0: {"metric": 0.9, "density": 0.1, "step_time_s": 2.5e-3}}),
    results.Row("RigL", "RigL", 0.95, {}),
]


def test_the_table_has_means_and_deviations_of_what_is_known():
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in results.markdown(ROWS, "acc").split("\n")
    ]
    assert cells[0] == ["method", "sparsity", "acc %", "density %", "step ms, measured", "seeds"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["dense", "", "98.00 ± 1.41", "100.00 ± 0.00", "", "2"]
    assert cells[3] == ["RigL", "0.9", "90.00", "10.00", "2.50", "1"]
    assert cells[4] == ["RigL", "0.95", "", "", "", "0"]


def test_several_sparsities_are_columns_of_a_second_table():
    rows = [*ROWS, results.Row("DST", "DST a=1", None, {0: {"metric": 0.75, "density": 0.25}})]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in results.by_sparsity(rows, "acc").split("\n")
    ]
    assert cells[0] == ["method", "acc % at 0.9", "acc % at 0.95", "own density"]
    assert cells[2] == ["dense", "", "", "98.00 ± 1.41 at density 100.00 ± 0.00 %"]
    assert cells[3] == ["RigL", "90.00", "", ""]
    assert cells[4] == ["DST a=1", "", "", "75.00 at density 25.00 %"]
    assert results.by_sparsity(rows[:2], "acc") == ""


@pytest.mark.parametrize(("metric", "value", "shown"), [("acc", 97.5, "97.5000"), ("loss", 0.5, "0.5000")])
def test_metrics_that_are_no_shares_are_shown_as_they_are(metric, value, shown):
    table = results.markdown([results.Row("dense", "dense", None, {0: {"metric": value}})], metric)
    assert table.splitlines()[0].split("|")[3].strip() == metric
    assert table.splitlines()[2].split("|")[3].strip() == shown


def test_csv_files_hold_plain_numbers(tmp_path):
    results.write_csv(ROWS, "val_acc", tmp_path / "table.csv", tmp_path / "runs.csv")
    dense, rigl, none = csv.DictReader((tmp_path / "table.csv").open())
    assert (dense["method"], dense["sparsity"], dense["seeds"]) == ("dense", "", "2")
    assert float(dense["val_acc_mean"]) == pytest.approx(0.98)
    assert float(dense["val_acc_std"]) == pytest.approx(0.02 / math.sqrt(2))
    assert (rigl["step_time_s_mean"], rigl["step_time_s_std"]) == ("0.0025", "")
    assert (none["seeds"], none["val_acc_mean"]) == ("0", "")
    singles = [(row["method"], row["seed"], row["val_acc"]) for row in csv.DictReader((tmp_path / "runs.csv").open())]
    assert singles == [("dense", "0", "0.97"), ("dense", "1", "0.99"), ("RigL", "0", "0.9")]


def test_the_plot_puts_a_curve_for_each_method_and_a_line_for_dense(tmp_path):
    more = [results.Row("DST", "DST", None, {s: {"metric": 0.9, "density": d} for s, d in enumerate((0.2, 0.3))})]
    figure.draw([*ROWS, *more], "val_acc", "title", [tmp_path / "new" / "plot.png", tmp_path / "new" / "plot.svg"])
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new" / "plot.svg").read_text()
    for words in ("<!-- title -->", "<!-- dense -->", "<!-- RigL -->", "<!-- DST -->", "<!-- val_acc, % -->"):
        assert words in text


# ---------------------------------------------------------------------- processes, without training


@dataclass(frozen=True)
class Stub(runs.Run):
    """A run that is a short Python program."""

    program: str = ""

    def start(self, threads, checkpoint):
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", self.program], stdout=log, stderr=log)


def stub(folder, name, program):
    return Stub(name, folder / name, folder, {}, (), program)


def test_runs_that_fail_are_returned_and_do_not_stop_others(tmp_path):
    said = []
    work = [stub(tmp_path, "a", "raise SystemExit(3)"), stub(tmp_path, "b", ""), stub(tmp_path, "c", "")]
    work[2].folder.mkdir()
    work[2].finish()
    failed = runs.train(work, 1, 1, 5, said.append)
    assert failed == [work[0]]
    assert [run.finished for run in work] == [False, True, True]
    assert said[0] == "1 of 3 runs have finished before"
    assert f"FAILED  a (exit status 3): see {work[0].log}" in said
    assert not work[2].log.exists()


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ('Traceback:\n  File "a.py"\n    raise\nValueError: alpha\nmust be\n\n', "ValueError: alpha|must be"),
        ("a\nb\nc\nd\n", "b|c|d"),
        ("Found nothing:\n  fc1.weight  frozen\n", "fc1.weight  frozen"),
        ("", ""),
    ],
)
def test_the_end_of_a_log_is_the_message_of_its_error(tmp_path, log, shown):
    run = stub(tmp_path, "a", "")
    run.folder.mkdir()
    run.log.write_text(log)
    assert run.last_words == "".join(f"\n        {line}" for line in shown.split("|") if line)


def test_a_run_that_fails_is_told_with_its_error(tmp_path):
    said = []
    run = stub(tmp_path, "a", "raise RuntimeError('power cut')")
    runs.train([run], 1, 1, 5, said.append)
    assert said[-1] == f"FAILED  a (exit status 1): see {run.log}\n        RuntimeError: power cut"


def test_a_metric_that_is_not_logged_is_told_when_the_first_run_has_finished(tmp_path, capsys):
    work = [stub(tmp_path, name, "") for name in "ab"]
    for run in work:
        lines_of(run.folder, 0, [{"epoch": 0, "val_acc": 0.5, "val_loss": 1}])
    seen = []
    look = command._look_for("val_f1")
    runs.train(work, 1, 1, 1, lambda line: None, lambda run: (seen.append(run), look(run)))
    assert seen == work
    told = [line for line in capsys.readouterr().err.splitlines() if "val_f1" in line]
    assert len(told) == 1
    assert told[0].startswith(
        f"NO METRIC  {work[0].folder} has logged no 'val_f1'. Choose --metric among: val_acc, val_"
    )
    command._look_for("val_acc")(work[0])
    assert "NO METRIC" not in capsys.readouterr().err


def test_a_metric_that_earlier_runs_lack_is_refused_before_anything_runs(tmp_path, capsys):
    run = runs.Run("dense", tmp_path / "dense" / "seed0", Path(), {})
    lines_of(run.folder, 0, [{"epoch": 0, "val_acc": 0.5}])
    run.finish()
    with pytest.raises(SystemExit, match="2"):
        cli.main(compare(tmp_path, "--methods=dense", "--metric=val_f1"))
    assert "has logged no 'val_f1'. Choose --metric among: val_acc" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_no_more_runs_than_jobs_are_at_work_at_once(tmp_path):
    program = f"import os, time; open(r'{tmp_path}/{{0}}', 'w').write(str(time.time())); time.sleep(0.2); "
    program += f"open(r'{tmp_path}/{{0}}.end', 'w').write(str(time.time()))"
    work = [stub(tmp_path / "runs", str(index), program.format(index)) for index in range(4)]
    assert runs.train(work, 2, 1, None, lambda line: None) == []
    begun, ended = ([float((tmp_path / f"{i}{end}").read_text()) for i in range(4)] for end in ("", ".end"))
    for moment in begun:
        assert sum(b <= moment < e for b, e in zip(begun, ended, strict=True)) <= 2


def test_a_training_that_does_not_end_when_told_to_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "GRACE", 0.2)
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        process.stdout.readline()
        runs._stop([process])
        assert process.returncode == -signal.SIGKILL


def echo(folder, monkeypatch):
    """Return a run whose ``fit`` prints its arguments and its number of threads."""
    program = folder / "echo"
    program.write_text('#!/bin/sh\necho "$@" threads=$OMP_NUM_THREADS\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    recipe = folder / "mine.yaml"
    changes = {"seed_everything": 7, "trainer": {"callbacks": [{"class_path": "lightning_sparse.SET"}]}}
    return runs.Run("run", folder / "run", recipe, changes, ("--data.init_args.batch_size=5",))


def test_a_run_is_one_fit_of_the_recipe_with_its_changes(tmp_path, monkeypatch):
    run = echo(tmp_path, monkeypatch)
    assert run.start(3, None).wait() == 0
    own = run.folder / "run.yaml"
    expected = f"-m lightning_sparse fit --config={run.recipe} --config={own} --data.init_args.batch_size=5 threads=3\n"
    assert run.log.read_text() == expected
    written = yaml.safe_load(own.read_text())
    assert written["seed_everything"] == 7
    assert written["trainer"]["callbacks"] == run.changes["trainer"]["callbacks"]
    assert written["trainer"]["logger"]["init_args"]["save_dir"] == str(run.folder)


def test_a_checkpoint_is_gone_on_with_if_it_can_be_loaded(tmp_path, monkeypatch):
    run = echo(tmp_path, monkeypatch)
    assert run.checkpoint() is None
    files = [run.folder / f"version_{attempt}" / "checkpoints" / "last.ckpt" for attempt in (9, 10)]
    for age, file in enumerate(files):
        file.parent.mkdir(parents=True)
        torch.save({"epoch": 1}, file)
        os.utime(file, (age, age))
    assert run.checkpoint() == files[1]
    assert run.start(1, files[1]).wait() == 0
    assert f"--ckpt_path={files[1]} " in run.log.read_text()
    assert files[0].exists()

    files[1].write_bytes(files[1].read_bytes()[:-100])
    os.utime(files[1])
    assert run.checkpoint() is None
    assert run.start(1, None).wait() == 0
    assert "--ckpt_path" not in run.log.read_text().splitlines()[1]
    assert not list(run.folder.glob("version_*"))


def test_a_folder_of_other_runs_is_refused(tmp_path):
    settings = {"recipe": "a", "epochs": 1, "options": []}
    command._settle(tmp_path, settings)
    command._settle(tmp_path, settings)
    with pytest.raises(ValueError, match="holds runs with another setting of: recipe, epochs"):
        command._settle(tmp_path, {"recipe": "b", "epochs": 2, "options": []})


@pytest.mark.parametrize("package", ["jsonargparse", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package} is not installed\. In a clone .*: pip install '\.\[\w+\]'"):
        cli.main(["compare", "--recipe", DIGITS, "--methods", "dense"])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- trainings


def compare(out, *args):
    return ["compare", "--recipe", DIGITS, "--out", str(out), "--trainer.accelerator=cpu", *args]


def test_a_comparison_trains_reads_draws_and_is_kept(tmp_path, capsys):
    args = compare(tmp_path, "--methods=dense,dst", "--seeds=2", "--epochs=1", "--jobs=2")
    with pytest.raises(SystemExit, match="0"):
        cli.main(args)
    captured = capsys.readouterr()
    for method in ("dense", "DST,alpha=0.003"):
        for seed in (0, 1):
            checkpoint = tmp_path / method / f"seed{seed}" / "version_0" / "checkpoints" / "last.ckpt"
            assert torch.load(checkpoint, weights_only=True)["global_step"] == 23
            config = yaml.safe_load(checkpoint.parents[1].joinpath("config.yaml").read_text())
            assert config["seed_everything"] == seed
    # by hand, from the files of Lightning's logger
    accuracies, densities = [], []
    for file in sorted(tmp_path.glob("DST*/seed*/version_0/metrics.csv")):
        logged = list(csv.DictReader(file.open()))
        accuracies += [float(row["val_acc"]) for row in logged if row["val_acc"]]
        densities += [1 - float(row["sparsity/model"]) for row in logged if row["sparsity/model"]]
    assert len(accuracies) == len(densities) == 2
    dense, dst = csv.DictReader((tmp_path / "table.csv").open())
    assert (dense["density_mean"], dst["seeds"]) == ("1.0", "2")
    assert float(dst["val_acc_mean"]) == pytest.approx(sum(accuracies) / 2)
    assert float(dst["val_acc_std"]) == pytest.approx(abs(accuracies[0] - accuracies[1]) / math.sqrt(2))
    assert float(dst["density_mean"]) == pytest.approx(sum(densities) / 2)
    cell = f"{100 * statistics.mean(accuracies):.2f} ± {100 * statistics.stdev(accuracies):.2f}"
    assert cell in captured.out
    assert captured.out.split("\n\n")[0] in (tmp_path / "table.md").read_text()
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert (tmp_path / "pareto.svg").is_file()
    assert len(list(csv.DictReader((tmp_path / "runs.csv").open()))) == 4

    assert command.main([*args[1:], "--no-plot", "--metric=val_loss"]) == 0
    assert "4 of 4 runs have finished before\nWritten" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("version_*"))) == 4

    assert command.main([*args[1:], "--methods=dense,dense:model.init_args.classes=3", "--seeds=1"]) == 1
    captured = capsys.readouterr()
    log = tmp_path / "dense,model.init_args.classes=3" / "seed0" / "log.txt"
    assert f"FAILED  dense model.init_args.classes=3, seed 0: see {log}" in captured.err
    assert "Target" in log.read_text()
    assert [line[-9:] for line in captured.out.splitlines()[2:4]] == ["| 1     |", "| 0     |"]


def test_a_comparison_that_is_interrupted_goes_on_from_its_checkpoint(tmp_path, capsys):
    epochs = 60
    args = compare(tmp_path, "--methods=dense", "--seeds=1", f"--epochs={epochs}", "--no-plot")
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_sparse", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    run = runs.Run("dense", tmp_path / "dense" / "seed0", Path(), {})
    with process:
        until = time.monotonic() + PATIENCE
        while run.epochs < 3 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert f"Interrupted: 0 of 1 runs have finished and are kept in {tmp_path}." in said
    assert f"Go on with: lightning-sparse compare --recipe {DIGITS} --out {tmp_path} " in said
    before = len(results.history(run.folder))
    assert 3 <= before < epochs

    assert command.main(args[1:]) == 0
    assert "go on   dense, seed 0" in capsys.readouterr().err
    (_, resumed) = sorted(run.folder.glob("version_*"))
    first = next(csv.DictReader((resumed / "metrics.csv").open()))
    assert 0 < int(first["epoch"]) <= before
    assert [epoch["epoch"] for epoch in results.history(run.folder)] == list(range(epochs))
