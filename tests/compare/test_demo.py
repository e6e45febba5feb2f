import csv
import re
import sys

import pytest
import torch
from report_records import record, save

from lightning_sparse import cli
from lightning_sparse.compare import demo
from lightning_sparse.report.runs import read
from lightning_sparse.report.text import operations
from lightning_sparse.zoo.models import LeNet300


@pytest.fixture
def results(tmp_path):
    """Return a sparse run and its dense baseline of some epochs."""
    return lambda epochs=8: [read(save(tmp_path / str(method), record(epochs, method))) for method in ("DFBST", None)]


def lines(text):
    """Return the table's cells by the first of their line."""
    cells = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return {line[0]: line[1:] for line in cells}


@pytest.mark.usefixtures("trainings_start_at_once")
def test_the_demo_trains_both_and_writes_what_it_says(tmp_path):
    text = demo.compare(epochs=2, out=str(tmp_path))
    for name in ("dense.ckpt", "dfbst.ckpt", "epochs.csv", "demo.png", "table.txt"):
        assert name in text
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.txt").read_text().strip() in text

    rows = list(csv.DictReader((tmp_path / "epochs.csv").open()))
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, e) for run in ("dense", "dfbst") for e in "12"]
    assert all(float(row["density/model"]) == 1 for row in rows if row["run"] == "dense")
    assert all(0 < float(row["density/fc1.weight"]) < 1 for row in rows if row["run"] == "dfbst")
    table = lines(text)
    assert table["val_acc"][:2] == [f"{100 * float(row['val_acc']):.2f} %" for row in (rows[1], rows[3])]
    count = 64 * 300 + 300 * 100 + 100 * 10
    assert table["inference FLOPs per example (theoretical)"][0] == operations(2 * count)
    training = 2 * (3 * count - 64 * 300)  # no gradient of the images
    assert table["training FLOPs per example (theoretical)"][0] == operations(training)

    loaded = LeNet300.load_from_checkpoint(tmp_path / "dfbst.ckpt")
    weights = torch.cat([layer.weight.flatten() for layer in (loaded.fc1, loaded.fc2, loaded.fc3)])
    assert int(weights.count_nonzero()) / len(weights) == pytest.approx(float(rows[-1]["density/model"]))
    saved = [torch.load(tmp_path / f"{run}.ckpt", weights_only=True) for run in ("dense", "dfbst")]
    assert saved[0]["global_step"] == saved[1]["global_step"] == 46
    assert [set(s["callbacks"]) & {k for k in s["callbacks"] if "DFBST" in k} != set() for s in saved] == [False, True]

    cli.main(text.splitlines()[-1].partition("lightning-sparse ")[2].split())  # the page that it names
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_the_table_says_what_is_measured_and_what_is_theory(results):
    text = demo.table(*results())
    for line in ("inference FLOPs per example (theoretical)", "training FLOPs", "(theoretical)"):
        assert line in text
    for line in ("time of a step (measured)", "peak memory (measured)", "not faster: DFBST"):
        assert line in text


def test_ratios_are_sparse_over_dense(results):
    text = demo.table(*results())
    table = lines(text)
    assert text.split()[:3] == ["dense", "DFBST", "compared"]
    assert table["val_acc"] == ["96.70 %", "96.20 %", "-0.50 points"]
    assert table["time of a step (measured)"] == ["1.9 ms", "2.1 ms", "× 1.11"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_figure_is_drawn_for_any_number_of_epochs(results, tmp_path, epochs):
    demo.figure(*results(epochs), "test", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_training_that_fails_shows_the_end_of_its_log(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho the reason >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match=r"Training dense failed; the end of .*log\.txt:\n +the reason"):
        demo.compare(out=str(tmp_path / "out"))


def test_missing_mnist_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"MNIST is not whole in .*gunzip"):
        cli.main(["demo", "--data", "mnist", "--data-dir", str(tmp_path)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "rigl"], "invalid choice: 'rigl'"),
        (["--data", "cifar"], "invalid choice: 'cifar'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(args)
    assert message in capsys.readouterr().err
