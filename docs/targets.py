"""Threshold methods with a target beside GMP and hand-tuned alphas, on part of MNIST: the tables of guides/targets.md.

``python docs/targets.py DIR --out results.csv`` trains what the file does not hold yet, a line a run, and prints the
tables. DIR holds MNIST/raw. Networks, methods, sparsities and seeds may be chosen; one CPU thread.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse import DFBST, DST, GMP, STR, AutoSparse
from lightning_sparse.zoo.data import MNISTDataModule
from lightning_sparse.zoo.models import LeNet5Caffe, LeNet300, SequenceLSTM
from lightning_sparse.zoo.models.classifier import Classifier


class SmallCNN(Classifier):
    """Three convolutions of 16, 32 and 32 filters, each with batch norm and ReLU, and a linear layer."""

    def __init__(self, **training):
        super().__init__(10, **training)
        layers, before = [], 1
        for width in (16, 32, 32):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            before = width
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 10))

    def forward(self, x):
        """Return logits."""
        return self.net(x)


#: network, number of training images, of epochs
NETWORKS = {
    "lenet300": (LeNet300, 6_000, 6),
    "cnn": (SmallCNN, 6_000, 4),
    "lenet5": (LeNet5Caffe, 6_000, 3),
    "lstm": (lambda **training: SequenceLSTM(hidden=128, **training), 6_000, 4),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
TARGETS = (0.9, 0.98, 0.5, 0.95, 0.8)
METHODS: dict[str, Callable[[float], pl.Callback]] = {
    "GMP": lambda s: GMP(s, begin_at=0.2, end_at=0.75, update_every=10),
    "DST": lambda s: DST(sparsity=s),
    "DFBST": lambda s: DFBST(sparsity=s),
    "AutoSparse": lambda s: AutoSparse(sparsity=s),
    "STR": lambda s: STR(sparsity=s),
}
ALPHAS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


class Batches(IterableDataset):
    """Batches of images, in another order each epoch."""

    def __init__(self, images, labels, size, seed):
        self.images, self.labels, self.size = images, labels, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for part in order.split(self.size):
            yield self.images[part], self.labels[part]

    def __len__(self):
        return -(-len(self.images) // self.size)


def run(data, network, optimizer, seed, callback):
    """Train; return accuracy in percent on the test images and the density."""
    build, count, epochs = NETWORKS[network]
    pl.seed_everything(seed, verbose=False)
    rate = OPTIMIZERS[optimizer]
    if network == "lstm" and optimizer == "SGD":
        rate = lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)  # noqa: E731
    module = build(optimizer=rate)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[] if callback is None else [callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0 if network == "lstm" else None,
    )  # fmt: skip
    train = Batches(data.train.images[:count], data.train.labels[:count], 64, seed)
    trainer.fit(module, DataLoader(train, batch_size=None))
    module.eval()
    with torch.no_grad():
        pairs = zip(data.test.images.split(1000), data.test.labels.split(1000), strict=True)
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / 100, 1.0 if callback is None else callback.density


def rows(chosen):
    """Yield what is to be trained, the first seed of everything first: network, optimizer, seed, method, setting."""
    networks, optimizers, methods = (part.split(",") for part in (chosen.networks, chosen.optimizers, chosen.methods))
    for seed in range(chosen.seeds):
        for target, network, optimizer, method in product(chosen.targets.split(","), networks, optimizers, methods):
            yield network, optimizer, seed, method, float(target)
        for network, optimizer, alpha in product(networks, optimizers, chosen.alphas.split(",")):
            yield network, optimizer, seed, "DST alpha", float(alpha)


def train(chosen):
    """Train all rows that the file lacks."""
    file = Path(chosen.out)
    known = {tuple(row[:5]) for row in csv.reader(file.open())} if file.exists() else set()
    data = MNISTDataModule(chosen.data_dir)
    data.setup("fit")
    for row in rows(chosen):
        key = tuple(map(str, row))
        if key in known:
            continue
        callback = DST(alpha=row[4]) if row[3] == "DST alpha" else METHODS[row[3]](row[4])
        start = time.perf_counter()
        accuracy, density = run(data, *row[:3], callback)
        with file.open("a") as out:
            csv.writer(out).writerow([*key, accuracy, density, round(time.perf_counter() - start, 1)])


def main():
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("--out", default="targets.csv")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--alphas", default=",".join(map(str, ALPHAS)))
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train(chosen)


if __name__ == "__main__":
    main()
