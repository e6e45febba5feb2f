"""Grids of short trainings on part of MNIST or CIFAR-10, for the scripts beside this one: what they share."""

import csv
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse.zoo.data import ImageFolderDataModule, MNISTDataModule
from lightning_sparse.zoo.data.images import TensorImages
from lightning_sparse.zoo.models.classifier import Classifier


class SmallCNN(Classifier):
    """Three convolutions of 16, 32 and 32 filters, each with batch norm, ReLU and pooling, and a linear layer."""

    def __init__(self, channels=1, size=28, **training):
        super().__init__(10, **training)
        self.first = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(32 * (size // 8) ** 2, 10)
        layers = [nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        for before in (16, 32):
            layers += [nn.Conv2d(before, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x):
        """Return logits."""
        return self.head(self.net(self.first(x)))


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


class Results:
    """The file of a grid: what has been trained, and what came of it.

    Args:
        file: a CSV file; it is made if it does not exist.
        run: the named tuple that says what is trained.
        names: of the results.
    """

    def __init__(self, file: str, run: type, names: tuple[str, ...]) -> None:
        self.file, self.run, self.names = Path(file), run, names
        if not self.file.exists():
            self.file.write_text(",".join((*run._fields, *names)) + "\n")
        here = Path(__file__).parent
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
        self.revision = found.stdout.strip()
        self.rows: dict[tuple, Mapping[str, str]] = {}
        for row in csv.DictReader(self.file.open()):
            self.rows[run(**{name: kind(row[name]) for name, kind in run.__annotations__.items()})] = row

    def add(self, run: tuple, *values: object) -> None:
        """Write results, to which the revision is added."""
        row = [*run, *values, self.revision]
        with self.file.open("a") as out:
            csv.writer(out, lineterminator="\n").writerow(row)
        self.rows[run] = dict(zip((*self.run._fields, *self.names), map(str, row), strict=True))


def mnist(folder: str) -> MNISTDataModule:
    """Return MNIST from a folder that holds MNIST/raw."""
    data = MNISTDataModule(folder)
    data.setup("fit")
    return data


def cifar10(folder: str) -> SimpleNamespace:
    """Return CIFAR-10, its classes mixed, from a folder that holds cifar10/train/CLASS/*.jpg and cifar10/test."""
    data = ImageFolderDataModule(str(Path(folder) / "cifar10"), padding=0, flip=False)
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train, test = data.train.__getitems__(order), data.test.__getitems__(range(len(data.test)))
    return SimpleNamespace(train=TensorImages(*train), test=TensorImages(*test))


def trained(data, run, build, optimizer, **options):
    """Train; return accuracy in percent on the test images and the density.

    Args:
        data: has ``train`` and ``test``.
        run: has ``seed``, ``images``, ``epochs`` and ``callback``, which has a density unless it trains densely.
        build: makes the network.
        optimizer: of its parameters.
        options: of the Trainer.
    """
    pl.seed_everything(run.seed, verbose=False)
    module, callback = build(optimizer=optimizer), run.callback
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=run.epochs, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    train = Batches(data.train.images[: run.images], data.train.labels[: run.images], run.seed)
    trainer.fit(module, DataLoader(train, batch_size=None))
    module.eval()
    with torch.no_grad():
        pairs = zip(data.test.images.split(1000), data.test.labels.split(1000), strict=True)
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / 100, getattr(callback, "density", 1.0)
