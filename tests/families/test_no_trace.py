"""Scores that are taken before training leave no trace in the run, whatever loads its data."""

import random

import lightning.pytorch as pl
import numpy
import pytest
import torch
from helpers import Lit, cnn, data, fit, loader, seeded, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from scored import METHODS
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparse import SNIP
from lightning_sparse.zoo.data import ResumableLoader, ResumableSampler


class Traced(Lit):
    """A module with everything that could carry a trace; what it saw is in ``seen``."""

    def __init__(self):
        super().__init__(nn.Sequential(cnn(), nn.Dropout(0.1)))
        self.accuracy = MulticlassAccuracy(4)
        self.seen = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transfers = getattr(self, "transfers", 0) + 1
        return batch

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        parts = [batch] if isinstance(parts[0], torch.Tensor) else parts
        loss = 0
        for x, y in parts:
            draws = torch.rand(()), random.random(), numpy.random.rand()
            self.seen.append((batch_idx, x.clone(), *draws, self.transfers))
            x.mul_(1 + 0.01 * draws[0])
            out = self(x)
            self.accuracy(out, y)
            loss = loss + nn.functional.cross_entropy(out, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss}, prog_bar=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.logger.experiment.log_metrics({"deep": float(loss.detach())}, step=self.global_step)
        return {"loss": loss}


class Augmented(Dataset):
    """Random generators of its own, also within a transform."""

    def __init__(self):
        self.x, self.y = data()
        self.random = random.Random(1)
        self.transform = [type("Noise", (), {})()]
        self.transform[0].numpy, self.transform[0].old = numpy.random.default_rng(2), numpy.random.RandomState(3)
        self.generator = torch.Generator().manual_seed(4)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = self.transform[0].numpy.normal() + self.transform[0].old.normal() + self.random.random()
        return self.x[index] + noise + torch.rand(1, generator=self.generator), self.y[index]


class Stream(IterableDataset):
    """Goes on where it was."""

    def __init__(self):
        self.x, self.y = data()
        self.place = 0

    def __iter__(self):
        for _ in range(96):
            self.place = (self.place + 1) % 240
            yield self.x[self.place], self.y[self.place]


class Batches:
    """Whole batches, which a training step may write to."""

    def __init__(self):
        self.batches = list(loader())
        self.passes = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        return iter(self.batches[self.passes :] + self.batches[: self.passes])


class Counting(torch.utils.data.Sampler):
    """An order of its own that changes with every pass."""

    def __init__(self):
        self.passes, self.random = 0, random.Random(0)

    def __len__(self):
        return 240

    def __iter__(self):
        self.passes += 1
        yield from self.random.sample(range(240), 240)


def dataset():
    return TensorDataset(*data())


def shuffled(**kwargs):
    return DataLoader(dataset(), batch_size=24, shuffle=True, **kwargs)


def resumable():
    return ResumableLoader(dataset(), 24, sampler=ResumableSampler(dataset(), 1, 0, shuffle=True, seed=3))


LOADERS = {
    "in order": loader,
    "shuffled": shuffled,
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "sampler": lambda: DataLoader(dataset(), batch_size=24, sampler=Counting()),
    "resumable": resumable,
    "augmented": lambda: DataLoader(Augmented(), batch_size=24, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=24),
    "no DataLoader": Batches,
    "list": lambda: [shuffled(), loader()],
    "dict": lambda: {"a": shuffled(), "b": DataLoader(dataset(), batch_size=60, shuffle=True)},
    "combined": lambda: CombinedLoader({"a": shuffled(), "b": loader()}, "min_size"),
    "workers": lambda: shuffled(num_workers=2),
    "persistent": lambda: DataLoader(
        Augmented(), 24, shuffle=True, num_workers=1, persistent_workers=True, generator=torch.Generator()
    ),
    "stream, worker": lambda: DataLoader(Stream(), batch_size=24, num_workers=1),
}


def traces(callbacks, train, folder, **kwargs):
    """Everything a run leaves behind."""
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    module = Traced()
    logger = CSVLogger(folder)
    run = trainer(callbacks, logger=logger, log_every_n_steps=1, **kwargs)
    run.fit(module, train(), loader(16))
    logged = [{k: v for k, v in row.items() if "sparsity" not in k} for row in logger.experiment.metrics]
    own = {k: float(v) for k, v in run.callback_metrics.items() if "sparsity" not in k}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    optimizer = run.optimizers[0].state_dict()["state"]
    modes = [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]
    return module.state_dict(), module.seen, logged, own, states, optimizer, modes


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("kind", LOADERS)
def test_scores_leave_no_trace_in_the_run(kind, tmp_path):
    """With sparsity 0 the run is, to the last bit, that of the dense network."""
    plain = traces([], LOADERS[kind], tmp_path / "plain")
    assert len(plain[1]) > 4
    for method in METHODS if kind == "shuffled" else ["GraSP"]:
        scored = traces([METHODS[method](0.0)], LOADERS[kind], tmp_path / method)
        for one, other in zip(plain, scored, strict=True):
            assert equal(one, other), method


def test_an_unsized_loader_whose_batches_are_fetched_ahead_leaves_no_trace(tmp_path):
    settings = {"limit_train_batches": 3}
    plain = traces([], LOADERS["stream"], tmp_path / "a", **settings)
    assert equal(plain, traces([SNIP(0.0, batches=4)], LOADERS["stream"], tmp_path / "b", **settings))


def test_the_comparison_of_runs_sees_a_single_draw(tmp_path):
    class Draws(pl.Callback):
        def on_train_start(self, *args):
            torch.rand(1)

    one, other = (traces(c, shuffled, tmp_path / str(len(c))) for c in ([], [Draws()]))
    assert not equal(one[1], other[1])


def test_the_module_of_the_run_is_not_touched():
    class Watches(Lit):
        def training_step(self, batch, batch_idx):
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(batch, batch_idx)

    class Checks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert getattr(pl_module, "steps", 0) == batch_idx
            assert all(p.grad is None for p in pl_module.parameters()) or batch_idx
            assert pl_module.trainer is trainer

    module, _ = fit(
        [SNIP(0.5, batches=4), Checks()],
        seeded(Watches),
        max_epochs=1,
    )
    assert module.steps == 30
