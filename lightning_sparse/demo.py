"""The demo: a sparse method and its dense twin, trained side by side from the recipes, and compared.

Each training is a process of its own with one thread, so that its peak memory is its own and both meet the same load.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from torch.nn.functional import cross_entropy

from lightning_sparse import recipes
from lightning_sparse._extras import extra
from lightning_sparse._lightning import Callback, LightningModule, Trainer
from lightning_sparse.latent import LatentCallback
from lightning_sparse.ledger import Average, Flops, dense_flops, inference, training
from lightning_sparse.process import peak_memory

__all__ = ["Recorder", "compare", "main"]

METHODS = {"dst": "DST", "dfbst": "DFBST", "autosparse": "AutoSparse", "str": "STR"}
Row = dict[str, Any]


class Recorder(Callback):
    """Writes one line of JSON an epoch: accuracy, densities, operations, time of a step and peak memory so far.

    Args:
        file: where to write.
        every_n_steps: how often the densities are read for the average of training operations.
    """

    def __init__(self, file: str, every_n_steps: int = 10) -> None:
        self.file = file
        self.every_n_steps = every_n_steps
        self.times: list[float] = []
        self.average = Average()
        self.flops: dict[str, Flops] = {}
        self.batch_size = 1
        self.method: LatentCallback | None = None
        self.begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the operations of a dense step on a real batch."""
        found = [c for c in trainer.callbacks if isinstance(c, LatentCallback)]  # type: ignore[attr-defined]
        self.method = found[0] if found else None
        x, y = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        self.batch_size = len(y)
        self.flops = dense_flops(pl_module, lambda: cross_entropy(pl_module(x), y))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock: time of this process, which other processes on the machine do not lengthen."""
        self.begun = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; now and then count the operations that the densities leave."""
        self.times.append(time.process_time() - self.begun)
        if trainer.global_step % self.every_n_steps == 1:
            density = self.method.layer_density if self.method else {}
            gradient_density = self.method.layer_gradient_density if self.method else {}
            self.average.add(training(self.flops, density, gradient_density))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's line."""
        layers = self.method.layer_density if self.method else {}
        row: Row = {
            "epoch": trainer.current_epoch + 1,
            "accuracy": float(trainer.callback_metrics["val_acc"]),
            "density": self.method.density if self.method else 1.0,
            "backward_density": self.method.gradient_density if self.method else 1.0,
            "inference_flops": inference(self.flops, layers) / self.batch_size,
            "training_flops": self.average.mean,
            "step_seconds": median(self.times),
            "peak_memory": peak_memory(),
            "layers": layers,
            "log_dir": trainer.log_dir,
        }
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------- training both


def compare(
    method: str = "dfbst",
    data: str = "digits",
    data_dir: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: str | None = None,
) -> str:
    """Train a method and its dense twin; write checkpoints, CSV and figure; return the table.

    Args:
        method: "dst", "dfbst", "autosparse" or "str".
        data: "digits" or "mnist".
        data_dir: for MNIST, the directory that holds ``MNIST/raw``.
        epochs: None: as in the recipe.
        seed: of both.
        out: directory for the results; default ``runs/demo-METHOD-DATA``.
    """
    for module in ("jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "sklearn", "torchvision"):
        extra(module, "cli,examples,report")
    if data == "mnist":
        from lightning_sparse.data import MNISTDataModule

        MNISTDataModule(data_dir or "data").prepare_data()
    folder = Path(out or f"runs/demo-{method}-{data}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = f"{method}-lenet300-{data}"
    options = [f"--seed_everything={seed}"]
    options += [f"--trainer.max_epochs={epochs}"] if epochs is not None else []
    options += [f"--data.init_args.data_dir={data_dir}"] if data == "mnist" and data_dir else []
    histories = _train(recipe, ("dense", method), options, folder)
    for run, history in histories.items():
        shutil.copyfile(Path(history[-1]["log_dir"], "checkpoints", "last.ckpt"), folder / f"{run}.ckpt")
    write_csv(histories, folder / "epochs.csv")
    figure(histories, f"LeNet-300-100 on {data}, seed {seed}", folder / "demo.png")
    text = table(histories)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    return f"{text}\n\nWritten to {folder}: {method}.ckpt, dense.ckpt, epochs.csv, demo.png, table.txt"


def _train(recipe: str, runs: Sequence[str], options: Sequence[str], folder: Path) -> dict[str, list[Row]]:
    """Train a recipe with and without its method at the same time, showing progress; return the rows of each run."""
    with TemporaryDirectory() as temporary:
        files = {run: Path(temporary, run) for run in runs}
        workers = {}
        try:
            for run in runs:
                log = folder / f"{run}.log"
                with log.open("w", encoding="utf-8") as stream:
                    command = _command(run, recipe, files[run], folder)
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    workers[run] = subprocess.Popen(
                        [*command, *options], stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment
                    )
            _follow(workers, files, _epochs(recipe, options), folder)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()
        return {run: _read(file) for run, file in files.items()}


def _command(run: str, recipe: str, file: Path, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "lightning_sparse", "fit", "--recipe", recipe),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"),
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--trainer.logger.init_args.name={run}",
        *(["--trainer.callbacks=null"] if run == "dense" else []),
        "--trainer.callbacks+=lightning_sparse.demo.Recorder",
        f"--trainer.callbacks.init_args.file={file}",
    ]


def _epochs(recipe: str, options: Sequence[str]) -> int:
    """Return the number of epochs that the runs will have, to show progress."""
    given = [option.split("=")[1] for option in options if option.startswith("--trainer.max_epochs=")]
    lines = recipes.path(recipe).read_text(encoding="utf-8").splitlines()
    given += [line.split(":")[1] for line in lines if line.strip().startswith("max_epochs:")]
    return int(given[0])


def _follow(
    workers: Mapping[str, subprocess.Popen[bytes]], files: Mapping[str, Path], epochs: int, folder: Path
) -> None:
    """Show a bar until all workers are done; raise if one fails."""
    bar = extra("tqdm", "cli").tqdm(total=epochs * len(workers), unit="epoch", desc=" and ".join(workers))
    with bar:
        while True:
            states = {run: worker.poll() for run, worker in workers.items()}
            rows = {run: _read(file) for run, file in files.items()}
            bar.update(sum(map(len, rows.values())) - bar.n)
            bar.set_postfix_str(
                ", ".join(f"{run} {history[-1]['accuracy']:.1%}" for run, history in rows.items() if history)
            )
            for run, state in states.items():
                if state not in (None, 0):
                    log = (folder / f"{run}.log").read_text(encoding="utf-8")
                    raise RuntimeError(f"Training {run} failed; the end of {folder / f'{run}.log'}:\n{log[-2000:]}")
            if all(state == 0 for state in states.values()):
                return
            time.sleep(0.2)


def _read(file: Path) -> list[Row]:
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------- showing both


def table(histories: Mapping[str, Sequence[Row]]) -> str:
    """Return the comparison of the last epochs as text."""
    (_, dense), (run, sparse) = ((run, history[-1]) for run, history in histories.items())
    method = METHODS[run]

    def ratio(key: str) -> str:
        return f"x {sparse[key] / dense[key]:.3g}"

    rows = [
        ("", "dense", method, "compared"),
        (
            "accuracy",
            f"{dense['accuracy']:.2%}",
            f"{sparse['accuracy']:.2%}",
            f"{100 * (sparse['accuracy'] - dense['accuracy']):+.2f} points",
        ),
        ("density of the weights", f"{dense['density']:.1%}", f"{sparse['density']:.1%}", ""),
        (
            "density of the weights' gradient",
            f"{dense['backward_density']:.1%}",
            f"{sparse['backward_density']:.1%}",
            "",
        ),
        ("inference FLOPs an image (theoretical)", *_both(dense, sparse, "inference_flops"), ratio("inference_flops")),
        ("training FLOPs a step, mean (theoretical)", *_both(dense, sparse, "training_flops"), ratio("training_flops")),
        (
            "CPU time of a step, median (measured)",
            f"{1e3 * dense['step_seconds']:.2f} ms",
            f"{1e3 * sparse['step_seconds']:.2f} ms",
            ratio("step_seconds"),
        ),
        (
            "peak memory of the process (measured)",
            f"{dense['peak_memory'] / 2**20:.0f} MiB",
            f"{sparse['peak_memory'] / 2**20:.0f} MiB",
            ratio("peak_memory"),
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"Masked training is not faster: {method} multiplies the same dense matrices, zeros included, and its own work",
        "comes on top. The theoretical FLOPs are what a machine that skips zeros would do. Most of the memory of",
        "so small a training is that of Python's packages (numba, where installed, is loaded by the method alone).",
    ]
    return "\n".join(lines)


def _both(dense: Row, sparse: Row, key: str) -> tuple[str, str]:
    return _engineering(dense[key]), _engineering(sparse[key])


def _engineering(value: float) -> str:
    """Write a count with three digits and a prefix.

    >>> _engineering(53240.0), _engineering(1.5e6)
    ('53.2 k', '1.5 M')
    """
    for size, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def write_csv(histories: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Write the rows of all runs, densities of layers as columns ``density/LAYER``."""
    rows = []
    for run, history in histories.items():
        for row in history:
            plain = {key: value for key, value in row.items() if key not in ("layers", "log_dir")}
            rows.append({"run": run, **plain, **{f"density/{name}": d for name, d in row["layers"].items()}})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


#: Okabe and Ito's colours, told apart with any colour vision
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def figure(histories: Mapping[str, Sequence[Row]], title: str, file: Path) -> None:
    """Draw density per layer over the epochs and, beside it, accuracy with the dense run for reference."""
    pyplot_figure = extra("matplotlib.figure", "report").Figure
    (_, dense), (run, sparse) = histories.items()
    method = METHODS[run]
    epochs = [row["epoch"] for row in sparse]
    marker = "o" if len(epochs) < 5 else None
    drawing = pyplot_figure(figsize=(10.5, 4.2), layout="constrained")
    drawing.suptitle(f"{method} beside its dense twin: {title}", fontsize=13, fontweight="bold")
    left, right = drawing.subplots(1, 2)
    for colour, name in zip(_COLOURS, sparse[-1]["layers"], strict=False):
        values = [row["layers"][name] for row in sparse]
        left.plot(epochs, values, color=colour, marker=marker, linewidth=1.8, label=f"{name}  {values[-1]:.1%}")
    values = [row["density"] for row in sparse]
    left.plot(epochs, values, color="black", marker=marker, linewidth=2.8, label=f"all weights  {values[-1]:.1%}")
    left.set(yscale="log", ylabel="density (nonzero weights)", title="Density of each layer")
    ticks = [tick for tick in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if tick > left.get_ylim()[0]]
    left.set_yticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    left.minorticks_off()
    left.legend(title="at the end", frameon=False)

    right.plot(epochs, [row["accuracy"] for row in sparse], color=_COLOURS[0], marker=marker, label=method)
    right.plot(epochs, [row["accuracy"] for row in dense], color="0.6", marker=marker, label="dense")
    right.axhline(dense[-1]["accuracy"], color="0.3", linestyle="--", linewidth=1, label="dense, at the end")
    settled = [row["accuracy"] for history in (dense, sparse) for row in history[len(history) // 10 :]]
    right.set_ylim(min(settled) - 0.01, min(1.0, max(settled) + 0.01))
    right.set(ylabel="accuracy", title="Accuracy on images held out")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(min(1, len(epochs) - 1), max(2, len(epochs)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
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
    print(compare(given.method, given.data, given.data_dir, given.epochs, given.seed, given.out))
