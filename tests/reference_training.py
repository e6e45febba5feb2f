"""Training of a module and of its independent reference on the same batches."""

import torch
from helpers import (
    Lit,
    data,
    fit,
    loader,
    mlp,
    seeded,
)
from reference import Reference
from torch import nn

OPTIONS = {
    "DST": {"alpha": 5e-3},
    "DFBST": {"alpha": 5e-3, "beta": 0.5},
    "AutoSparse": {"alpha": 0.6, "init_threshold": -2.5},
    "STR": {"init_threshold": -2.5},
}
NAMES = ["0.weight", "2.weight", "4.weight"]


def granularity(method):
    return "layer" if method in ("AutoSparse", "STR") else "neuron"


def mean_loss(call, x, y):
    return nn.functional.cross_entropy(call(x), y)


def train_reference(method, groups, loss=mean_loss, clip=None, schedule=None, epochs=1, step=None):
    """Train on 30 batches of 8 an epoch; ``groups(reference)`` makes the optimizer."""
    net = seeded(lambda: mlp(torch.float64))
    reference = Reference(net, NAMES, method, granularity(method), **OPTIONS[method])
    optimizer = groups(reference)
    scheduler = schedule(optimizer) if schedule else None
    x, y = data(240, torch.float64)
    for epoch in range(epochs):
        reference.anneal(epoch, epochs)
        for i in range(30):
            batch = slice(8 * i, 8 * i + 8)
            for _ in range(1 if step is None else step):
                optimizer.zero_grad()
                reference.loss(lambda call, b=batch: loss(call, x[b], y[b])).backward()
                reference.mask_gradients()
                if clip:
                    clip(reference.trained())
                optimizer.step()
                reference.guard()
            if scheduler:
                scheduler.step()
    return reference


def check(callback, reference):
    assert 0.01 < callback.sparsity < 0.99, "the test would prove nothing"
    for name in NAMES:
        ours = callback.latents[f"net.{name}"], callback.thresholds[f"net.{name}"]
        for mine, theirs in zip(ours, (reference.W[name].detach(), reference.t[name].detach()), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9), name


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def by_layer(net, more=None):
    """Two groups that differ in everything: the first layer, and the others."""
    return torch.optim.SGD(
        [
            {"params": net[0], "lr": 0.2, "weight_decay": 1e-2},
            {"params": net[1], "lr": 0.05, "momentum": 0.5},
        ],
        lr=0.1,
        momentum=0.9,
    )


def module_groups(module):
    parameters = list(module.net.parameters())
    return by_layer([parameters[:2], parameters[2:]])


def reference_groups(reference):
    def group(names, rest):
        extra = [reference.t_b[n] for n in names] if reference.method == "DFBST" else []
        return [reference.W[n] for n in names] + rest + [reference.t[n] for n in names] + extra

    rest = list(reference.rest.values())
    return by_layer([group(NAMES[:1], rest[:1]), group(NAMES[1:], rest[1:])])


class Grouped(Lit):
    schedule = None

    def configure_optimizers(self):
        optimizer = module_groups(self)
        return [optimizer], [self.schedule(optimizer)] if self.schedule else []


def double():
    return mlp(torch.float64)


def train(callback, module, **kwargs):
    return fit(callback, module, loader(dtype=torch.float64), **{"max_epochs": 1, **kwargs})
