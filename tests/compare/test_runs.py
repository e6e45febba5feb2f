"""Processes of ``lightning-sparse compare``, without training."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from lightning_sparse import cli
from lightning_sparse.compare import command, runs

DIGITS = "dense-lenet300-digits"


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


# ---------------------------------------------------------------------- processes, without training


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
    with pytest.raises(SystemExit, match=rf"{package} is not installed: pip install 'lightning-sparse\[\w+\]'"):
        cli.main(["compare", "--recipe", DIGITS, "--methods", "dense"])
    assert list(tmp_path.iterdir()) == []


def compare(out, *args):
    return ["compare", "--recipe", DIGITS, "--out", str(out), "--trainer.accelerator=cpu", *args]
