"""Every way to drive an optimizer: manual, several of them or of their groups, schedules, clipping, odd losses."""

import contextlib
import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LATENT,
    MASKED,
    SETTINGS,
    THRESHOLDS,
    TOP_K,
    Lit,
    data,
    effective,
    fit,
    loader,
    mlp,
    same,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import BackboneFinetuning
from reference import Reference
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_sparse import DST, STR

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


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds_share_the_group_of_their_weight(method):
    callback = SETTINGS[method]()
    _, run = train(callback, seeded(lambda: Grouped(double())))
    groups = run.optimizers[0].param_groups
    assert len(groups) == 2, "no group of their own, which schedulers and checkpoints would have to know"
    per_weight = len(callback.threshold_names)
    assert [len(group["params"]) for group in groups] == [2 + per_weight, 4 + 2 * per_weight]
    check(callback, train_reference(method, reference_groups))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_learning_rate_schedules_reach_thresholds_in_every_group(method):
    class Scheduled(Grouped):
        @staticmethod
        def schedule(optimizer):
            return {"scheduler": StepLR(optimizer, 10, 0.3), "interval": "step"}

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Scheduled(double())))
    check(callback, train_reference(method, reference_groups, schedule=lambda o: StepLR(o, 10, 0.3)))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_one_cycle_trains_as_the_reference(method):
    def cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.2, total_steps=31)

    class Cycled(Lit):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            return [optimizer], [{"scheduler": cycle(optimizer), "interval": "step"}]

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Cycled(double())))
    check(callback, train_reference(method, lambda r: sgd(r.trained()), schedule=cycle))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_reduce_on_plateau_lowers_the_one_learning_rate_that_weights_and_thresholds_have(method):
    class Plateau(Lit):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            scheduler = ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flat"}}

        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Moves(pl.Callback):
        def __init__(self):
            self.ends = []

        def on_train_epoch_end(self, *args):
            self.ends.append({name: t.clone() for name, t in callback.thresholds.items()})

    callback, moves = SETTINGS[method](), Moves()
    _, run = train([callback, moves], seeded(lambda: Plateau(double())), max_epochs=6)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**5)
    for name in callback.thresholds:
        early, late = ((moves.ends[i + 1][name] - moves.ends[i][name]).abs().max() for i in (0, 4))
        assert late < 0.02 * early


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_gradient_clipping_takes_weights_and_thresholds_together(method, algorithm):
    limit = 0.1 if algorithm == "norm" else 0.01
    clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
    callback = SETTINGS[method]()
    train(
        callback,
        seeded(lambda: Lit(double())),
        max_epochs=2,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    kwargs = {"clip": lambda parameters: clip(parameters, limit), "epochs": 2}
    check(callback, train_reference(method, lambda r: sgd(r.trained()), **kwargs))


@pytest.mark.parametrize("shape", [torch.sqrt, torch.exp, torch.sigmoid])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_losses_whose_value_is_needed_for_backward(method, shape):
    class Shaped(Lit):
        def training_step(self, batch, batch_idx):
            return shape(super().training_step(batch, batch_idx))

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Shaped(double())))
    loss = lambda call, x, y: shape(mean_loss(call, x, y))  # noqa: E731
    check(callback, train_reference(method, lambda r: sgd(r.trained()), loss=loss))


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


def test_a_gan_with_two_optimizers_trains_sparse_in_both(method):
    callback = SETTINGS[method]()
    if getattr(callback, "needs_loss", False):
        with pytest.raises(Exception, match=f"{method} needs the loss .* but Gan optimizes manually"):
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


@pytest.mark.parametrize("method", [*MASKED, "TopKAST", "SWAT"])
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


def test_a_complex_parameter_trains_beside_the_weights(method):
    class Complex(Lit):
        def __init__(self, **options):
            super().__init__(**options)
            self.factor = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x):
            return super().forward(x) * self.factor.abs()

    callback = SETTINGS[method]()
    module, _ = fit(callback, seeded(Complex), max_epochs=2)
    assert effective(module, callback)
    assert (module.factor != 1).all()


@pytest.mark.skipif(not hasattr(torch.optim.Optimizer, "_process_value_according_to_param_policy"), reason="old torch")
def test_optimizers_of_named_parameters_name_the_thresholds_too(method, tmp_path):
    class Named(Lit):
        def configure_optimizers(self):
            return sgd(self.named_parameters())

    try:
        sgd(Named().named_parameters())
    except TypeError:
        pytest.skip("this torch takes no named parameters")
    named, plain = SETTINGS[method](), SETTINGS[method]()
    _, run = fit(named, seeded(Named), max_epochs=1)
    fit(plain, max_epochs=1)
    (group,) = run.optimizers[0].param_groups
    assert len(group["params"]) == len(group["param_names"])
    assert method not in THRESHOLDS or "net.0.weight.t" in group["param_names"]
    assert same(state(plain), state(named))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = SETTINGS[method]()
    trainer(again, max_epochs=2).fit(seeded(Named), loader(), ckpt_path=tmp_path / "last.ckpt")


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


def test_lbfgs_is_refused(method):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.LBFGS(p)))
    with pytest.raises(Exception, match=f"{method} cannot train with LBFGS.*Use a first-order optimizer"):
        fit(SETTINGS[method](), module)


def test_an_optimizer_that_outlives_a_fit_takes_thresholds_once():
    class Keeps(Lit):
        def __init__(self):
            super().__init__()
            self.kept = sgd(self.parameters())

        def configure_optimizers(self):
            return self.kept

    module, callback = seeded(Keeps), STR(-2.5)
    for _ in range(3):
        fit(callback, module, max_epochs=1)
        assert len(module.kept.param_groups[0]["params"]) == 6 + 3


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
