"""The first batch of a fit shows whether a module computes with sparse layers what it computes with dense ones."""

import random
import re

import lightning.pytorch as pl
import numpy
import pytest
import torch
from helpers import Lit, fit, loader, seeded
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stored import METHODS, images
from torch import nn

import lightning_sparse.storage.compare as compare
import lightning_sparse.storage.sparse as training
from lightning_sparse import RandomPruning, RigL
from lightning_sparse.layers import functional


class Types(Lit):
    def forward(self, x):
        for layer in self.net:
            x = 2 * layer(x) if type(layer) is nn.Linear else layer(x)
        return x


class Names(Lit):
    def forward(self, x):
        x = self.net[:3](x)
        return self.net[3:](x if type(self.net[2]).__name__ == "Linear" else x.abs())


class Skips(Lit):
    def forward(self, x):
        return self.net[4](self.net[0](x)[:, :10]) if type(self.net[2]) is nn.Linear else self.net(x)


class Means(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 10 * sum(p.square().mean() for p in self.parameters())


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (Types, "something else enters net.2"),
        (Names, "something else enters net.4"),
        (Skips, "something else enters net.4"),
        (Means, "training_step returns something else"),
    ],
)
def test_code_that_computes_something_else_with_sparse_layers_is_told_where(module, what):
    match = rf"must not change what {module.__name__} computes, but on the first batch {re.escape(what)} .*exclude"
    with pytest.raises(MisconfigurationException, match=match):
        fit(RandomPruning(0.5, storage="sparse"), seeded(module), max_epochs=1)


class Sums(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * sum(p.abs().sum() for p in self.parameters())


class Manual(Lit):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Noisy(Lit):
    generator = numpy.random.default_rng(0)  # of the class: copies share it

    def forward(self, x):
        return self.net(x + float(self.generator.normal()))


class Fails(Lit):
    def on_train_batch_start(self, batch, batch_idx):
        self.begun = torch.ones(1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.begun


@pytest.mark.parametrize("module", [Lit, Sums, Manual, Noisy, Fails])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_module_that_computes_the_same_trains(module, precision):
    _, run = fit(RandomPruning(0.5, storage="sparse"), seeded(module), max_epochs=1, precision=precision)
    assert run.global_step == 30


def test_a_layer_that_computes_something_else_is_named(monkeypatch):
    right = functional.conv2d
    monkeypatch.setattr("lightning_sparse.layers.sparse.conv2d", lambda *args: right(*args) * 1.5)
    with pytest.raises(MisconfigurationException, match=r"net\.1 returns something else for the same input"):
        fit(RandomPruning(0.5, storage="sparse"), seeded(lambda: Lit(images())))


def test_a_module_too_large_is_not_compared(monkeypatch):
    monkeypatch.setattr(training, "COMPARED_LIMIT", 100)
    fit(RandomPruning(0.5, storage="sparse"), seeded(Types), max_epochs=1)


def norms():
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))


class Draws(Lit):
    def __init__(self):
        super().__init__(norms())
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.log("step", float(self.steps))
        noise = random.random() + numpy.random.rand() + torch.rand(1)
        batch[0].add_(noise)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["SET", "RigL", "MemoryEfficientDST grabo"])
def test_a_run_is_what_it_is_without_the_comparison(method, monkeypatch):
    found = []
    for compared in (True, False):
        if not compared:
            monkeypatch.setattr(compare, "difference", lambda *_: None)
        pl.seed_everything(1)
        module, run = fit(METHODS[method](storage="sparse", update_every=3), Draws(), loader(), max_epochs=1)
        found.append((module.state_dict(), run.callback_metrics, module.steps, torch.rand(1), random.random()))
    (ours, *others), (theirs, *theirs_others) = found
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert others == theirs_others


@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_are_compared():
    module = torch.compile(seeded(Types), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"something else enters net\.2"):
        fit(RigL(0.5, storage="sparse"), module, max_epochs=1)
