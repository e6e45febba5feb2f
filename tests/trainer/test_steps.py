"""Every way to take a step: by hand, several in a batch, none, broken off, or through a base class."""

import contextlib
import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    HOOKED,
    REPRESENTATIVES,
    SETTINGS,
    THRESHOLDS,
    TOP_K,
    Lit,
    effective,
    fit,
    mlp,
    same,
    seeded,
    state,
)
from reference_training import (
    check,
    double,
    mean_loss,
    sgd,
    train,
    train_reference,
)
from torch import nn

from lightning_sparse import DST


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


class Manual(Lit):
    """Three steps a batch."""

    raw = False

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        for _ in range(3):
            optimizer.zero_grad()
            loss = mean_loss(self, *batch)
            loss.backward() if self.raw else self.manual_backward(loss)
            optimizer.step()


class Raw(Manual):
    """The same past all of Lightning's hooks."""

    raw = True


@pytest.mark.parametrize("kind", [Manual, Raw])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_several_manual_steps_a_batch_train_as_the_reference(method, kind):
    callback = SETTINGS[method]()
    train(callback, seeded(lambda: kind(double())))
    check(callback, train_reference(method, lambda r: sgd(r.trained()), step=3))


class Closure(Raw):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure():
            optimizer.zero_grad()
            loss = mean_loss(self, *batch)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)


@pytest.mark.parametrize("method", THRESHOLDS)
def test_raw_steps_with_a_closure_train_as_the_reference(method):
    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Closure(double())))
    check(callback, train_reference(method, lambda r: sgd(r.trained()), step=3))


class Gan(pl.LightningModule):
    """Two optimizers; two steps of the discriminator and one of the generator a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = nn.Linear(3, 12), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
        self.moved = []
        self.example_input_array = torch.zeros(1, 3)

    def forward(self, x):
        return self.d(self.g(x))

    def configure_optimizers(self):
        return sgd(self.g.parameters()), torch.optim.AdamW(self.d.parameters(), lr=0.02, weight_decay=1e-2)

    def training_step(self, batch, batch_idx):
        real, fake = batch[0], self.g(batch[0][:, :3])
        optimizer_g, optimizer_d = self.optimizers()
        before = self.g.weight.detach().clone()
        for _ in range(2):
            self.toggle_optimizer(optimizer_d)
            optimizer_d.zero_grad()
            self.manual_backward((self.d(fake.detach()) - self.d(real)).mean().exp())
            optimizer_d.step()
            self.untoggle_optimizer(optimizer_d)
        self.moved.append(not torch.equal(before, self.g.weight))
        self.toggle_optimizer(optimizer_g)
        optimizer_g.zero_grad()
        self.manual_backward((1 - self.d(fake)).square().mean())
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_a_gan_with_two_optimizers_trains_sparse_in_both(method):
    callback = SETTINGS[method]()
    if getattr(callback, "needs_loss", False):
        with pytest.raises(Exception, match=f"{method}.* needs the loss .* but Gan optimizes manually"):
            fit(callback, seeded(Gan))
        return
    module, run = fit(callback, seeded(Gan))
    assert run.global_step == 60 * 3
    assert not any(module.moved), "the discriminator's step leaves the generator alone"
    assert set(callback.masks) == {"g.weight", "d.0.weight", "d.2.weight"}
    assert effective(module, callback)
    assert all(torch.isfinite(x).all() for x in state(callback).values())
    start = {"AutoSparse": -2.5, "STR": -2.5}.get(method, 0)
    assert method not in THRESHOLDS or all((t != start).any() for t in callback.thresholds.values())
    assert 0 < callback.sparsity < 1


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_batches_without_a_loss_change_nothing(method):
    class Skips(Lit):
        def training_step(self, batch, batch_idx):
            self.states.append(copy.deepcopy((state(callback), self.net.state_dict())))
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    callback = SETTINGS[method]()
    module = seeded(Skips)
    module.states = []
    fit(callback, module, max_epochs=1)
    for i in range(29):
        assert same(module.states[i], module.states[i + 1]) == (i % 3 == 1)


def test_a_skipped_step_does_not_count_its_penalty_later():
    """Lightning's recipe for stepping every other batch: gradients of the batches between are thrown away."""

    class EveryOther(Lit):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    class Flat(EveryOther):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0

    callback = DST(alpha=0.1)
    module = seeded(lambda: Flat(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    fit(callback, module, max_epochs=1, limit_train_batches=2)
    assert callback.thresholds["net.0.weight"].tolist() == pytest.approx([0.1 * 0.1] * 16)


def test_a_short_last_accumulation_window_counts_its_own_batches():
    """Lightning divides each loss by 4, also where only two batches are left: so half the penalty."""
    callback = DST(alpha=0.1)
    module = seeded(lambda: Zero(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    fit(callback, module, max_epochs=1, limit_train_batches=6, accumulate_grad_batches=4)
    first = 0.01
    second = first + 0.1 * 0.1 * math.exp(-first) / 2
    assert callback.thresholds["net.0.weight"].tolist() == pytest.approx([second] * 16)


class Zero(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0


class Calls(torch.optim.SGD):
    """Its step calls that of its base class, which has the optimizer's hooks as well."""

    def step(self, closure=None):
        return super().step(closure)


class First(Calls):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


class Shifts(Calls):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            torch._foreach_add_(group["params"], 0.01)
        return loss


@pytest.mark.parametrize("kind", [Calls, First])
@pytest.mark.parametrize("method", [*TOP_K, "DFBST", "DeepR", "RigL"])
def test_an_optimizer_whose_step_calls_that_of_its_base_class_makes_one_update(method, kind):
    def train(kind):
        callback = SETTINGS[method]()
        module, _ = fit(callback, seeded(lambda: Lit(optimizer=lambda p: kind(p, lr=0.1, momentum=0.9))), max_epochs=1)
        return state(callback), callback.state_dict().get("updates"), module.state_dict()

    assert same(train(torch.optim.SGD), train(kind))


@pytest.mark.parametrize("method", ["DST", "TopKAST"])
def test_an_optimizer_that_changes_weights_after_the_step_of_its_base_class_leaves_exact_zeros(method):
    callback = SETTINGS[method]()
    module, _ = fit(callback, seeded(lambda: Lit(optimizer=lambda p: Shifts(p, lr=0.1))), max_epochs=1)
    assert effective(module, callback)


def test_training_goes_on_after_an_update_that_was_broken_off():
    class Fails(Calls):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise FloatingPointError
            return super().step(closure)

    class GoesOn(Manual):
        def configure_optimizers(self):
            return Fails(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.fails = batch_idx == 3
            with contextlib.suppress(FloatingPointError):
                super().training_step(batch, batch_idx)

    callback = SETTINGS["TopKAST"]()
    module, _ = fit(callback, seeded(lambda: GoesOn(mlp())), max_epochs=1)
    assert set(callback.state_dict()["updates"].values()) == {29 * 3}
    assert effective(module, callback)
