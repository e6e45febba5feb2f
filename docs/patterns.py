"""Patterns beside unstructured sparsity, at equal density, on part of MNIST: the tables of guides/patterns.md.

``python docs/patterns.py DIR --out results.csv`` trains what the file does not hold yet and adds a line to it after
each run, so it may be broken off and started again. Then it prints the mean accuracy over the seeds that the file
holds. DIR holds MNIST/raw. ``--times`` trains nothing: it prints how long a layer of 4096 x 4096 takes in the form that
pays. Networks, densities, patterns, methods, seeds, images and epochs may be chosen; one CPU thread.
"""

import argparse
import csv
import logging
import statistics
import subprocess
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse import GMP, SET, SRSTE, SSTE, RigL, SRigL
from lightning_sparse.export import to_csr
from lightning_sparse.rules import sampling
from lightning_sparse.rules.fan_in import FanIn
from lightning_sparse.storage import SparseLinear
from lightning_sparse.zoo.data import MNISTDataModule
from lightning_sparse.zoo.models import LeNet300
from lightning_sparse.zoo.models.classifier import Classifier


class SmallCNN(Classifier):
    """Three convolutions of 16, 32 and 32 filters, each with batch norm and ReLU, and a linear layer."""

    def __init__(self, **training):
        super().__init__(10, **training)
        self.first, self.head = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.Linear(32 * 9, 10)
        layers = [nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        for before in (16, 32):
            layers += [nn.Conv2d(before, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x):
        """Return logits."""
        return self.head(self.net(self.first(x)))


#: network, layers that stay dense (those whose rows are classes, or that have one input), images, epochs
NETWORKS = {"lenet300": (LeNet300, ["fc3.weight"], 4_000, 3), "cnn": (SmallCNN, ["first.*", "head.*"], 4_000, 2)}
DENSITIES = (0.5, 0.25, 0.1)
PATTERNS = ("unstructured", "N:M", "block:4x4", "row", "fan-in")
METHODS: dict[str, Callable[..., pl.Callback]] = {
    "RigL": RigL,
    "SET": SET,
    "GMP": partial(GMP, begin_at=0.2, end_at=0.75, update_every=10, scope="layer"),
}
#: methods that train one pattern alone
OWN: dict[str, dict[str, Callable[..., pl.Callback]]] = {
    "N:M": {"SRSTE": SRSTE, "SSTE": SSTE},
    "fan-in": {"SRigL": SRigL},
}
ALL = [*METHODS, *(method for methods in OWN.values() for method in methods)]
RESULTS = ("accuracy", "active", "seconds", "revision")


class Run(NamedTuple):
    """What is trained."""

    network: str
    images: int
    epochs: int
    seed: int
    density: float
    pattern: str
    method: str

    @property
    def kind(self) -> str:
        """One of ``PATTERNS``."""
        return self.pattern if self.pattern in PATTERNS else "N:M"

    @property
    def callback(self) -> pl.Callback:
        """The method."""
        exclude, budget = NETWORKS[self.network][1], {"sparsity": 1 - self.density, "distribution": "uniform"}
        own = OWN.get(self.kind, {}).get(self.method)
        if own is None:
            return METHODS[self.method](**budget, exclude=exclude, pattern=self.pattern)
        return own(pattern=self.pattern, exclude=exclude) if self.kind == "N:M" else own(**budget, exclude=exclude)


class Batches(IterableDataset):
    """Batches of 64 images, in another order each epoch."""

    def __init__(self, images, labels, seed):
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in torch.randperm(len(self.images), generator=self.generator).split(64):
            yield self.images[part], self.labels[part]

    def __len__(self):
        return -(-len(self.images) // 64)


def trained(data, run: Run):
    """Train; return accuracy in percent on the test images and the share of active weights."""
    pl.seed_everything(run.seed, verbose=False)
    rate = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4)  # noqa: E731
    module, callback = NETWORKS[run.network][0](optimizer=rate), run.callback
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=run.epochs, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train = Batches(data.train.images[: run.images], data.train.labels[: run.images], run.seed)
    trainer.fit(module, DataLoader(train, batch_size=None))
    module.eval()
    with torch.no_grad():
        pairs = zip(data.test.images.split(1000), data.test.labels.split(1000), strict=True)
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / 100, callback.density


def runs(chosen) -> Iterator[Run]:
    """Yield what is to be trained, the first seed of everything first."""
    networks, patterns, methods = (part.split(",") for part in (chosen.networks, chosen.patterns, chosen.methods))
    densities = [float(x) for x in chosen.densities.split(",")]
    for network, seed, kind, density in product(networks, range(chosen.seeds), patterns, densities):
        _, _, images, epochs = NETWORKS[network]
        n_of_m = {0.5: "2:4", 0.25: "1:4"}.get(density)
        pattern = n_of_m if kind == "N:M" else kind
        trained = {**(METHODS if kind != "fan-in" else {}), **OWN.get(kind, {})}
        for method in (method for method in methods if pattern and method in trained):
            yield Run(network, chosen.images or images, chosen.epochs or epochs, seed, density, pattern, method)


def rows(file: Path) -> dict[Run, dict[str, str]]:
    """Return what a file holds."""
    found = csv.DictReader(file.open()) if file.exists() else ()
    types = Run.__annotations__
    return {Run(**{name: kind(row[name]) for name, kind in types.items()}): row for row in found}


def train(chosen):
    """Train all that the file lacks."""
    file = Path(chosen.out)
    if not file.exists():
        file.write_text(",".join((*Run._fields, *RESULTS)) + "\n")
    here = Path(__file__).parent
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    data = MNISTDataModule(chosen.data_dir)
    data.setup("fit")
    known = rows(file)
    for run in (run for run in runs(chosen) if run not in known):
        start = time.process_time()
        results = trained(data, run)
        with file.open("a") as out:
            csv.writer(out).writerow([*run, *results, round(time.process_time() - start, 1), revision.stdout.strip()])


def table(chosen):
    """Print means and deviations of accuracies, in percent."""
    found = defaultdict(list)
    for run, row in rows(Path(chosen.out)).items():
        found[run.network, run.density, run.method, run.kind].append(float(row["accuracy"]))
    print(f"| network | density | method | {' | '.join(PATTERNS)} |\n|{'---|' * (3 + len(PATTERNS))}")
    for network, density, method in product(NETWORKS, DENSITIES, ALL):
        cells = [shown(found.get((network, density, method, pattern), [])) for pattern in PATTERNS]
        if any(cells):
            print(f"| {network} | {density:g} | {method} | {' | '.join(cells)} |")


def shown(found):
    """Return mean and deviation as the table has them."""
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""


def layers(density: float, generator: torch.Generator) -> dict[str, nn.Module]:
    """Return a layer of 4096 x 4096 in the forms that pay."""
    size = 4096
    dense = nn.Linear(size, size)
    kept = FanIn().draw(round(density * size) * size, (size, size), generator)
    positions = {"unstructured": sampling.distinct(len(kept), size * size, generator), "fan-in": kept}
    blocks = torch.rand(size // 4, size // 4, generator=generator) < density
    mask = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    positions["block:4x4"] = mask.view(-1).nonzero().view(-1)
    sparse = {name: SparseLinear.from_dense(dense, found) for name, found in positions.items()}
    return {"dense": dense, **sparse, "row": nn.Linear(size, round(density * size))}


def times(chosen):
    """Print times of a training step and of inference of a layer, over those of the dense one, in the same rounds."""
    names = [name for name in PATTERNS if name != "N:M"]
    print(f"| density | batch | {' | '.join(f'{name}: step, inference' for name in names)} |")
    for density in (float(x) for x in chosen.densities.split(",")):
        forms = layers(density, torch.Generator().manual_seed(0))
        products = {name: to_csr(layer) if isinstance(layer, SparseLinear) else layer for name, layer in forms.items()}
        for batch in (1, 16, 64, 256):
            x = torch.rand(batch, 4096)
            work = {(name, "step"): partial(step, layer, x) for name, layer in forms.items()}
            work |= {(name, "inference"): partial(infer, layer, x) for name, layer in products.items()}
            best = least(work, chosen.rounds)
            both = ([best[name, kind] / best["dense", kind] for kind in ("step", "inference")] for name in names)
            ratios = " | ".join(f"{step:.2f}, {inference:.2f}" for step, inference in both)
            print(f"| {density:g} | {batch} | {ratios} |", flush=True)


def least(work, rounds):
    """Return the least processor time of each of several functions, which are called in turn."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, call in work.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start) if turn else best[name]
    return best


def step(layer, x):
    """Compute output and gradients."""
    x = x.requires_grad_()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


@torch.no_grad()
def infer(layer, x):
    """Compute the output."""
    layer(x)


def main():
    """Train and print the table, or measure times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", nargs="?")
    parser.add_argument("--out", default="patterns.csv")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--methods", default=",".join(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="number of training images; default: the network's")
    parser.add_argument("--epochs", type=int, help="default: the network's")
    parser.add_argument("--times", action="store_true", help="measure a layer of 4096 x 4096, train nothing")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement; the least time counts")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if chosen.times:
        times(chosen)
        return
    if chosen.data_dir:
        train(chosen)
    table(chosen)


if __name__ == "__main__":
    main()
