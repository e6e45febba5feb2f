import csv
import subprocess
import sys

import pytest
import torch

from lightning_sparse import cli, demo
from lightning_sparse.models import LeNet300


def history(method_density, accuracy, epochs=3):
    return [
        {
            "epoch": epoch + 1,
            "accuracy": accuracy,
            "density": method_density,
            "backward_density": 0.5,
            "inference_flops": 2e5 * method_density,
            "training_flops": 4e6 * method_density,
            "step_seconds": 0.002 - 0.001 * method_density,
            "peak_memory": 2.0**29,
            "layers": {"fc1.weight": method_density} if method_density < 1 else {},
            "log_dir": "",
        }
        for epoch in range(epochs)
    ]


HISTORIES = {"dense": history(1.0, 0.97), "dfbst": history(0.1, 0.96)}


def test_the_demo_trains_both_and_writes_what_it_says(tmp_path):
    text = demo.compare(epochs=2, out=str(tmp_path))
    for name in ("dense.ckpt", "dfbst.ckpt", "epochs.csv", "demo.png", "table.txt"):
        assert name in text
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.txt").read_text().strip() in text

    rows = list(csv.DictReader((tmp_path / "epochs.csv").open()))
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, e) for run in ("dense", "dfbst") for e in "12"]
    assert all(float(row["density"]) == 1 for row in rows if row["run"] == "dense")
    assert all(0 < float(row["density/fc1.weight"]) < 1 for row in rows if row["run"] == "dfbst")
    count = 64 * 300 + 300 * 100 + 100 * 10
    assert float(rows[0]["inference_flops"]) == 2 * count
    assert float(rows[0]["training_flops"]) == 64 * 2 * (3 * count - 64 * 300)  # no gradient of the images

    loaded = LeNet300.load_from_checkpoint(tmp_path / "dfbst.ckpt")
    weights = torch.cat([layer.weight.flatten() for layer in (loaded.fc1, loaded.fc2, loaded.fc3)])
    assert int(weights.count_nonzero()) / len(weights) == float(rows[-1]["density"])
    saved = [torch.load(tmp_path / f"{run}.ckpt", weights_only=True) for run in ("dense", "dfbst")]
    assert saved[0]["global_step"] == saved[1]["global_step"] == 46
    assert [set(s["callbacks"]) & {k for k in s["callbacks"] if "DFBST" in k} != set() for s in saved] == [False, True]


def test_the_table_says_what_is_measured_and_what_is_theory():
    text = demo.table(HISTORIES)
    for line in ("inference FLOPs an image (theoretical)", "training FLOPs a step, mean (theoretical)"):
        assert line in text
    for line in ("CPU time of a step, median (measured)", "peak memory of the process (measured)", "not faster"):
        assert line in text


def test_the_csv_has_a_row_an_epoch_and_run(tmp_path):
    demo.write_csv(HISTORIES, tmp_path / "epochs.csv")
    rows = list(csv.DictReader((tmp_path / "epochs.csv").open()))
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, e) for run in ("dense", "dfbst") for e in "123"]
    assert [row["density/fc1.weight"] for row in rows] == [""] * 3 + ["0.1"] * 3


def test_ratios_are_sparse_over_dense():
    lines = {line[:20].strip(): line for line in demo.table(HISTORIES).splitlines()}
    assert lines["accuracy"].split() == ["accuracy", "97.00%", "96.00%", "-1.00", "points"]
    assert lines["inference FLOPs an i"].split()[-6:] == ["200", "k", "20", "k", "x", "0.1"]
    assert lines["CPU time of a step,"].split()[-6:] == ["1.00", "ms", "1.90", "ms", "x", "1.9"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_figure_is_drawn_for_any_number_of_epochs(tmp_path, epochs):
    histories = {"dense": history(1.0, 0.97, epochs), "dst": history(0.1, 0.96, epochs)}
    demo.figure(histories, "test", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_training_that_fails_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "dense.log").write_text("the reason")
    worker = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with worker, pytest.raises(RuntimeError, match=r"(?s)Training dense failed; the end of .*dense\.log:\nthe reason"):
        demo._follow({"dense": worker}, {"dense": tmp_path / "none"}, 1, tmp_path)


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
