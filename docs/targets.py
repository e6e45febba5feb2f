"""Threshold methods with a target beside GMP, and beside tuning by hand, on part of MNIST: tables of guides/targets.md.

``python docs/targets.py DIR --out results.csv`` trains what the file does not hold yet and adds a line to it after each
run, so it may be broken off and started again. Then it prints the mean accuracy over the seeds that the file holds. DIR
holds MNIST/raw. Networks, optimizers, methods, sparsities, seeds, images and epochs may be chosen; one CPU thread.
"""

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from grid import Results, SmallCNN, mnist, trained

from lightning_sparse import DFBST, DST, GMP, STR, AutoSparse
from lightning_sparse.zoo.models import LeNet5Caffe, LeNet300, SequenceLSTM

#: network, number of training images, of epochs
NETWORKS = {
    "lenet300": (LeNet300, 6_000, 6),
    "cnn": (SmallCNN, 3_000, 4),
    "lenet5": (LeNet5Caffe, 3_000, 4),
    "lstm": (lambda **training: SequenceLSTM(hidden=128, **training), 6_000, 4),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}
#: of the LSTM, which learns too little with the others in so few epochs
RECURRENT = {"SGD": partial(torch.optim.SGD, lr=0.3, momentum=0.9), "Adam": partial(torch.optim.Adam, lr=3e-3)}
TARGETS = (0.9, 0.98, 0.5, 0.95, 0.8)
METHODS: dict[str, Callable[[float], pl.Callback]] = {
    "GMP": lambda s: GMP(s, begin_at=0.2, end_at=0.75, update_every=10),
    "DST": lambda s: DST(sparsity=s),
    "DFBST": lambda s: DFBST(sparsity=s),
    "AutoSparse": lambda s: AutoSparse(sparsity=s),
    "STR": lambda s: STR(sparsity=s),
}
#: what is tuned by hand instead of a target, and its values
TUNED: dict[str, tuple[Callable[[float], pl.Callback], tuple[float, ...]]] = {
    "DST alpha": (lambda x: DST(alpha=x), (5e-5, 1e-4, 2e-4, 4e-4)),
    "DFBST alpha": (lambda x: DFBST(alpha=x), (5e-5, 1e-4, 2e-4, 4e-4)),
    "AutoSparse decay": (lambda x: AutoSparse(threshold_weight_decay=x), (1e-3, 1.5e-3, 2e-3, 3e-3)),
    "STR decay": (lambda x: STR(init_threshold=-5, threshold_weight_decay=x), (1e-3, 1.5e-3, 2e-3, 3e-3)),
}
CLIPPED = {"gradient_clip_val": 1.0}
RESULTS = ("accuracy", "density", "seconds", "revision")


class Run(NamedTuple):
    """What is trained; ``setting`` is the sparsity, or what is tuned by hand."""

    network: str
    optimizer: str
    images: int
    epochs: int
    seed: int
    method: str
    setting: float

    @property
    def callback(self) -> pl.Callback:
        """The method."""
        build = TUNED[self.method][0] if self.method in TUNED else METHODS[self.method]
        return build(self.setting)


def options(run: Run) -> tuple:
    """Return network, optimizer and arguments of the Trainer."""
    build, *_ = NETWORKS[run.network]
    if run.network == "lstm":
        return build, RECURRENT[run.optimizer], CLIPPED
    return build, OPTIMIZERS[run.optimizer], {}


def runs(chosen) -> Iterator[Run]:
    """Yield what is to be trained, the first seed of everything first."""
    networks, optimizers, methods = (part.split(",") for part in (chosen.networks, chosen.optimizers, chosen.methods))
    targets = [float(x) for x in chosen.targets.split(",")]
    settings = [(method, target) for target in targets for method in methods]
    if chosen.tuned:
        settings = [(name, x) for name, (_, values) in TUNED.items() if name.split()[0] in methods for x in values]
    for seed, network, optimizer, setting in product(range(chosen.seeds), networks, optimizers, settings):
        _, images, epochs = NETWORKS[network]
        yield Run(network, optimizer, chosen.images or images, chosen.epochs or epochs, seed, *setting)


def train(chosen):
    """Train all that the file lacks; after what is tuned by hand, a target of the density that it ended with."""
    results, data = Results(chosen.out, Run, RESULTS), mnist(chosen.data_dir)

    def density(run: Run) -> float:
        if run not in results.rows:
            start, (build, rate, more) = time.perf_counter(), options(run)
            found = trained(data, run, build, rate, **more)
            results.add(run, *found, round(time.perf_counter() - start, 1))
        return float(results.rows[run]["density"])

    for run in runs(chosen):
        left = density(run)
        if run.method in TUNED:
            density(run._replace(method=run.method.split()[0], setting=round(1 - left, 6)))


def tables(chosen):
    """Print mean accuracies, in percent, over seeds, and how many seeds there are."""
    found = defaultdict(list)
    for run, row in Results(chosen.out, Run, RESULTS).rows.items():
        found[run._replace(seed=0)].append((float(row["accuracy"]), float(row["density"])))
    print("| network, optimizer, images, epochs | method | setting | seeds | accuracy | density |")
    print("|---|---|---|---|---|---|")
    for run, results in sorted(found.items()):
        accuracy, density = (statistics.mean(column) for column in zip(*results, strict=True))
        training = f"{run.network}, {run.optimizer}, {run.images}, {run.epochs}"
        print(f"| {training} | {run.method} | {run.setting:g} | {len(results)} | {accuracy:.2f} | {density:.4f} |")


def main():
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("--out", default="targets.csv")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tuned", action="store_true", help="what is tuned by hand, beside targets of its densities")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="number of training images; default: the network's")
    parser.add_argument("--epochs", type=int, help="default: the network's")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train(chosen)
    tables(chosen)


if __name__ == "__main__":
    main()
