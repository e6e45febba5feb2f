"""``lightning-sparse compare`` trains, is interrupted, and goes on."""

import csv
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import PATIENCE, environment, started

from lightning_sparse import cli
from lightning_sparse.compare import command, results, runs

DIGITS = "dense-lenet300-digits"


def compare(out, *args):
    return ["compare", "--recipe", DIGITS, "--out", str(out), "--trainer.accelerator=cpu", *args]


# ---------------------------------------------------------------------- trainings


@pytest.mark.usefixtures("trainings_start_at_once")
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
        (logged,) = csv.DictReader(file.open())  # a row an epoch
        accuracies.append(float(logged["val_acc"]))
        densities.append(1 - float(logged["sparsity/model"]))
    assert len(accuracies) == len(densities) == 2
    dense, dst = csv.DictReader((tmp_path / "table.csv").open())
    assert (dense["density_mean"], dst["seeds"]) == ("1.0", "2")
    assert float(dst["val_acc_mean"]) == pytest.approx(sum(accuracies) / 2)
    assert float(dst["val_acc_std"]) == pytest.approx(abs(accuracies[0] - accuracies[1]) / math.sqrt(2))
    assert float(dst["density_mean"]) == pytest.approx(sum(densities) / 2)
    cell = f"{100 * statistics.mean(accuracies):.2f} ± {100 * statistics.stdev(accuracies):.2f}"
    assert cell in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert (tmp_path / "pareto.svg").is_file()
    assert len(list(csv.DictReader((tmp_path / "runs.csv").open()))) == 4

    assert command.main([*args[1:], "--no-plot", "--metric=val_loss", "--full"]) == 0
    captured = capsys.readouterr()
    assert "4 of 4 runs have finished before\nWritten" in captured.err
    assert captured.out.split("\n\n")[0] in (tmp_path / "table.md").read_text()
    assert len(list(tmp_path.rglob("version_*"))) == 4

    assert command.main([*args[1:], "--methods=dense,dense:model.init_args.classes=3", "--seeds=1"]) == 1
    captured = capsys.readouterr()
    log = tmp_path / "dense,model.init_args.classes=3" / "seed0" / "log.txt"
    assert f"FAILED  dense model.init_args.classes=3, seed 0: see {log}" in captured.err
    assert "Target" in log.read_text()
    assert [line[-9:] for line in captured.out.splitlines()[2:4]] == ["| 1     |", "| 0     |"]


@pytest.mark.usefixtures("trainings_start_at_once")  # what it goes on with
def test_a_comparison_that_is_interrupted_goes_on_from_its_checkpoint(tmp_path, capsys):
    epochs = 30
    args = compare(tmp_path, "--methods=dense", "--seeds=1", f"--epochs={epochs}", "--no-plot")
    with (tmp_path / "said").open("w") as said:
        process = started([sys.executable, "-m", "lightning_sparse", *args], said, environment())
    run = runs.Run("dense", tmp_path / "dense" / "seed0", Path(), {})
    until = time.monotonic() + PATIENCE
    while run.epochs < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    assert process.poll() == 130
    said = (tmp_path / "said").read_text()
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
