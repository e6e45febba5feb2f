"""Numbers, tables and plots of ``lightning-sparse compare``."""

import csv
import json
import math

import pytest

from lightning_sparse.compare import figure, results


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
    assert cells[0] == ["acc % at sparsity", "0.9", "0.95", "at its own density"]
    assert cells[2] == ["dense", "", "", "98.00 ± 1.41 at 100.00 %"]
    assert cells[3] == ["RigL", "90.00", "", ""]
    assert cells[4] == ["DST a=1", "", "", "75.00 at 25.00 %"]
    assert results.by_sparsity(rows[:2], "acc") == ""


def test_the_table_of_a_terminal_has_room_in_100_columns():
    values = {column.name: 0.123 for column in results.COLUMNS} | {"step_time_s": 9.9, "peak_memory_bytes": 2e9}
    long = "MemoryEfficientDST update_every=200 heuristic=grabo"
    rows = [
        results.Row("MemoryEfficientDST", title, sparsity, {0: values, 1: values})
        for title in (f"{long} a", f"{long} b", f"TopKAST {long}")
        for sparsity in (0.9, 0.95, 0.98)
    ]
    short = results.shortened(rows)
    assert [row.title for row in short[::3]] == [f"{long} a", f"{long} b", "TopKAST MemoryEfficient..."], (
        "two are alike"
    )
    assert len(results.by_sparsity(short[6:], "val_acc").splitlines()[0]) <= 100
    header = results.narrow(short[6:], "val_acc").splitlines()[0]
    assert len(header) <= 100
    assert header.replace(" ", "").startswith("|method|sparsity|val_acc%|density%|FLOPs%|")
    assert results.narrow(short, "val_acc", 10).splitlines()[0].split("|")[3].strip() == "val_acc %"


def test_methods_that_hardly_moved_a_connection_are_found():
    def moved(method, *updates):
        return results.few_updates(results.Row(method, method, 0.9, {i: {"updates": n} for i, n in enumerate(updates)}))

    assert moved("SET", 9, 4) == 4
    assert moved("SET", 0) == 0
    assert moved("SET", 5) is moved("SET") is moved("SNIP", 0) is moved("dense", 0) is None


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


@pytest.mark.parametrize("content", [b"epoch,a\n0,high\n", b"\xd8"])
def test_a_broken_log_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"version_0/metrics\.csv must be as a run writes it, but is broken .* Remove"):
        results.history(tmp_path)
