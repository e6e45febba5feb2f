"""The demo: a sparse method and its dense baseline, trained side by side from the recipes, and compared.

Each training is a process of its own with one thread, so that its peak memory is its own and both meet the same load.
"""

import argparse
import csv
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.compare.recipe import Recipe
from lightning_sparse.compare.runs import Run, say, terminated_as_interrupted, train
from lightning_sparse.compat.extras import extra
from lightning_sparse.monitor.record import densities, scalars
from lightning_sparse.report import charts
from lightning_sparse.report.figures import density_chart, metric_chart, numbers, settled
from lightning_sparse.report.runs import Run as Result
from lightning_sparse.report.runs import known, read
from lightning_sparse.report.view import headline

__all__ = ["compare", "main"]

METHODS = ("dst", "dfbst", "autosparse", "str")
_METRIC = "val_acc"


def compare(
    method: str = "dfbst",
    data: str = "digits",
    data_dir: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: str | None = None,
) -> str:
    """Train a method and its dense baseline; write checkpoints, CSV and figure; return the table.

    Args:
        method: "dst", "dfbst", "autosparse" or "str".
        data: "digits" or "mnist".
        data_dir: for MNIST, the directory that holds ``MNIST/raw``.
        epochs: None: as in the recipe.
        seed: of both.
        out: directory for the results; default ``runs/demo-METHOD-DATA``. The trainings have a folder in it named by
            the time, so that each demo trains anew and none overwrites them.

    Raises:
        FileNotFoundError: there is no MNIST.
        ModuleNotFoundError: a package of an extra is not installed.
        RuntimeError: a training failed; the message has the end of its log.
    """
    for module in ("jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "sklearn", "torchvision"):
        extra(module, "cli,examples,report")
    if data == "mnist":
        from lightning_sparse.zoo.data import MNISTDataModule

        MNISTDataModule(data_dir or "data").prepare_data()
    folder = Path(out or f"runs/demo-{method}-{data}")
    trainings = folder / time.strftime("%Y%m%d-%H%M%S")
    recipe = Recipe.read(f"{method}-lenet300-{data}")
    trainer: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if epochs is not None:
        trainer["max_epochs"] = epochs
    options = (f"--data.init_args.data_dir={data_dir}",) if data == "mnist" and data_dir else ()
    runs = [
        Run(name, trainings / name, recipe.file, {"seed_everything": seed, "trainer": {**trainer, **own}}, options)
        for name, own in (("dense", {"callbacks": recipe.others}), (method, {}))
    ]
    failed = train(runs, jobs=2, threads=1, epochs=epochs or recipe.epochs, say=say)
    if failed:
        raise RuntimeError(f"Training {failed[0].name} failed; the end of {failed[0].log}:{failed[0].last_words}")
    results = {run.name: read(run.folder / "version_0") for run in runs}
    for name, result in results.items():
        shutil.copyfile(result.folder / "checkpoints" / "last.ckpt", folder / f"{name}.ckpt")
    write_csv(results, folder / "epochs.csv")
    sparse, dense = results[method], results["dense"]
    figure(sparse, dense, f"LeNet-300-100 on {data}, seed {seed}", folder / "demo.png")
    text = table(sparse, dense)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    return (
        f"{text}\n\nWritten to {folder}: {method}.ckpt, dense.ckpt, epochs.csv, demo.png, table.txt\n"
        f"A page on it: lightning-sparse report {sparse.folder} --dense {dense.folder}"
    )


def table(sparse: Result, dense: Result) -> str:
    """Return the comparison of the last epochs, that of the report, as text."""
    rows = [("", "dense", sparse.method or "", "compared")]
    for row in headline(sparse, dense, _METRIC):
        rows.append((f"{row.label} ({row.kind})" if row.kind else row.label, row.dense, row.sparse, row.compared))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"Masked training is not faster: {sparse.method} multiplies the same dense matrices, zeros included, and adds",
        "its own work. The theoretical FLOPs are those of a machine that skips zeros. Times are wall-clock times: both",
        "train at once, and on a busy machine their ratio says little. In so small a training, Python's packages take",
        "most of the memory (only the method loads numba, if it is installed).",
    ]
    return "\n".join(lines).replace("\u2212", "-")  # a minus that every terminal has


def write_csv(results: Mapping[str, Result], file: Path) -> None:
    """Write a line an epoch and run: metrics, and what SparsityMonitor logs, under its names and in its units."""
    rows = [
        {"run": name, "epoch": epoch["epoch"] + 1, **epoch["metrics"], **densities(epoch), **scalars(epoch)}
        for name, result in results.items()
        for epoch in result.epochs
    ]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def figure(sparse: Result, dense: Result, title: str, file: Path) -> None:
    """Draw density per layer over the epochs and, beside it, accuracy with the dense run for reference."""
    densities, accuracies = density_chart(sparse), metric_chart(sparse, dense, _METRIC)
    lowest = min(known([value for line in densities.legend for value in line.values]))
    limits, _ = settled([list(line.values) for line in accuracies.legend])
    drawing, (left, right) = charts.panels(2, (10.5, 4.2))
    drawing.suptitle(f"{sparse.method} beside its dense baseline: {title}", fontsize=13, fontweight="bold")
    charts.draw_lines(left, numbers(sparse), densities.legend, ylabel="weights not masked", log=lowest < 0.2)
    charts.draw_lines(right, numbers(sparse), accuracies.legend, ylabel="accuracy", limits=limits)
    left.set_title(densities.title)
    right.set_title("Accuracy on images held out")
    for axes in (left, right):
        axes.legend(title="at the end", title_fontsize="small", fontsize="small", frameon=False)
    drawing.savefig(file, dpi=150)


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="lightning-sparse demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", choices=METHODS, default="dfbst", help="default: %(default)s")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="default: %(default)s")
    parser.add_argument("--data-dir", help="for MNIST: the directory that holds MNIST/raw (default: data)")
    parser.add_argument("--epochs", type=int, help="default: as in the recipe")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", help="directory for the results (default: runs/demo-METHOD-DATA)")
    given = parser.parse_args(args)
    if given.epochs is not None and given.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {given.epochs}")
    with terminated_as_interrupted():
        print(compare(given.method, given.data, given.data_dir, given.epochs, given.seed, given.out))
