"""Weights that join, thaw or freeze during a fit."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers import LATENT, REPRESENTATIVES, SETTINGS, THRESHOLDS, Lit, effective, fit, seeded
from lightning.pytorch.callbacks import BackboneFinetuning
from reference_training import sgd
from torch import nn

from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.trainer.joining import take_added
from lightning_sparse.trainer.ownership import Ownership


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


def test_weights_that_join_by_add_param_group_train_sparse_from_then_on(method):
    class Joins(Lit):
        def configure_optimizers(self):
            return sgd(self.net[:4].parameters())

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[4].parameters()), "lr": 0.05})

    class Knows(pl.Callback):
        def on_train_epoch_end(self, *args):
            known.append(set(callback.masks))

    known, callback = [], SETTINGS[method]()
    module, run = fit([callback, Knows()], seeded(Joins), max_epochs=3)
    assert known == [{"net.0.weight", "net.2.weight"}] + [{"net.0.weight", "net.2.weight", "net.4.weight"}] * 2
    group = run.optimizers[0].param_groups[1]
    assert len(group["params"]) == 2 + len(getattr(callback, "threshold_names", ()))
    assert group["lr"] == 0.05
    assert effective(module, callback)
    if method in LATENT:
        assert callback.latents["net.4.weight"].all(), "the dense weights live on"
    if method in THRESHOLDS:
        start = {"AutoSparse": -2.5, "STR": -2.5}.get(method, 0)
        assert (callback.thresholds["net.4.weight"] != start).any()
    else:
        assert callback.layer_density["net.4.weight"] < 1


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_weights_that_are_unfrozen_later_train_sparse_from_then_on(method):
    class Thaws(Lit):
        def on_train_epoch_start(self):
            self.net[4].requires_grad_(self.current_epoch > 0)

    module = seeded(lambda: Thaws(optimizer=sgd))
    module.net[4].requires_grad_(False)
    frozen = module.net[4].weight.clone()

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            known.append(set(callback.masks))
            if trainer.current_epoch == 0:
                assert torch.equal(pl_module.net[4].weight, frozen)

    known, callback = [], SETTINGS[method]()
    fit([callback, Looks()], module, max_epochs=3)
    assert known == [{"net.0.weight", "net.2.weight"}] + [{"net.0.weight", "net.2.weight", "net.4.weight"}] * 2
    assert effective(module, callback)
    mask = callback.masks["net.4.weight"]
    assert not torch.equal(module.net[4].weight[mask], frozen[mask])


@pytest.mark.parametrize("method", THRESHOLDS)
def test_weights_that_are_frozen_during_the_fit_stay_as_they_are(method):
    class Freezes(Lit):
        def on_train_epoch_start(self):
            self.net[0].weight.requires_grad_(self.current_epoch == 0)
            if self.current_epoch == 1:
                self.then = self.net[0].weight.clone()

    callback = SETTINGS[method]()
    module, _ = fit(callback, seeded(Freezes), max_epochs=3)
    assert torch.equal(module.net[0].weight, module.then)
    assert effective(module, callback)


@pytest.mark.parametrize("method", [*REPRESENTATIVES[1:], "SWAT"])
def test_a_finetuning_callback_thaws_weights_that_train_sparse_then(method):
    class Tuned(Lit):
        def __init__(self):
            super().__init__()
            self.net, self.backbone = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)), nn.Linear(12, 16)

        def forward(self, x):
            return self.net(self.backbone(x).relu())

        def configure_optimizers(self):
            return sgd(filter(lambda p: p.requires_grad, self.parameters()))

    callback = SETTINGS[method]()
    module, _ = fit([BackboneFinetuning(1), callback], seeded(Tuned), max_epochs=3)
    assert set(callback.masks) == {"net.0.weight", "net.2.weight", "backbone.weight"}
    assert effective(module, callback)
    assert callback.layer_density["backbone.weight"] < 1


def test_only_weights_that_an_optimizer_trains_now_and_nobody_had_are_taken_over():
    class Method:
        """What taking added weights asks of a method."""

        planned_density, _weights, added = {}, {"0.weight": None}, ()

        def choices_in(self, module):
            return select_parameters(module)

        def attach_added(self, choices, optimizer):
            self.added = [choice.name for choice in choices]

    net, method = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)), Method()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    strategy = SimpleNamespace(model=None)
    method._fit = Fit(module=net, trainer=SimpleNamespace(callbacks=[], world_size=1, strategy=strategy))
    method._weights = {"0.weight": SimpleNamespace(parameter=net[0].weight)}
    ownership = Ownership([optimizer], method.choices_in(net))
    assert not ownership.has_grown(optimizer)
    optimizer.add_param_group({"params": list(net[1].parameters())})
    assert ownership.has_grown(optimizer)
    take_added(method, optimizer, ownership)
    assert method.added == ["1.weight"]
    assert not ownership.has_grown(optimizer)
    assert method._fit.module_size == sum(p.numel() for p in net.parameters())
