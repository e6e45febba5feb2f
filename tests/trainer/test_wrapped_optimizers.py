"""Optimizers that wrap others, as those of timm and other packages do, train sparse or are refused."""

import itertools
from collections import OrderedDict, defaultdict
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAINLY, ROUNDS, SETTINGS, Lit, effective, fit, loader, same, seeded, state, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stored import measured
from torch.optim.lr_scheduler import StepLR

import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse.compat.optimizers import StepHook, hook_step


@pytest.fixture(autouse=True)
def quick_and_the_same_everywhere(monkeypatch):
    """No measurement decides who multiplies."""
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))


METHODS = {**SETTINGS, **ROUNDS, "RigL sparse": lambda **kw: SETTINGS["RigL"](storage="sparse", **kw)}


def base(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


class Hooked(torch.optim.Optimizer):
    """Has the hooks' dictionaries, but torch never calls them: ``Optimizer.__init__`` has not run."""

    def __init__(self, base):
        self.base, self.defaults = base, base.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)


class Bare(Hooked):
    """Has not even these dictionaries."""

    def __init__(self, base):
        self.base, self.defaults = base, base.defaults


class Copies(torch.optim.Optimizer):
    """Has groups of its own, with lists of its own."""

    def __init__(self, base):
        super().__init__([{**group, "params": list(group["params"])} for group in base.param_groups], base.defaults)
        self.inner = base

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


class Several(Copies):
    """Keeps what it steps in a list."""

    def __init__(self, base):
        super().__init__(base)
        self.inner, self.all = None, [base]

    def step(self, closure=None):
        loss = closure()
        for each in self.all:
            each.step()
        return loss

    def state_dict(self):
        return self.all[0].state_dict()

    def load_state_dict(self, state_dict):
        self.all[0].load_state_dict(state_dict)


class Duck:
    """No Optimizer at all."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)


class Lookahead(Hooked):
    """Every third step weights go half the way back to slow ones, which are those of the start."""

    def __init__(self, base):
        super().__init__(base)
        self.kept = defaultdict(dict)
        for group in base.param_groups:
            group["counter"] = 0
            self.init_group(group)

    state = property(lambda self: self.kept)

    def init_group(self, group):
        for p in group["params"]:
            self.kept[p].setdefault("slow_params", p.detach().clone())

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        for group in self.param_groups:
            group["counter"] += 1
            for p in group["params"] if group["counter"] % 3 == 0 else ():
                p.lerp_(self.kept[p]["slow_params"], 0.5)
                self.kept[p]["slow_params"].copy_(p)
        return loss


def trained(method, optimizer, schedule=None):
    callback = METHODS[method]()
    module, run = fit(callback, seeded(lambda: Lit(optimizer=optimizer, scheduler=schedule)), loader(120), max_epochs=3)
    return callback, module, run


@cache
def unwrapped(method, schedule=None):
    return trained(method, base, schedule)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *itertools.product(["DST", "RigL", "OptG"], [Hooked, Bare, Copies, Several, Duck]),
        *itertools.product(["DFBST", "TopKAST", "GMP", "LotteryTicket", "RigL sparse"], [Bare, Copies]),
    ],
)
def test_a_wrapper_trains_as_the_optimizer_within(method, kind):
    expected, module, _ = unwrapped(method)
    callback, other, _ = trained(method, lambda p: kind(base(p)))
    assert same(state(callback), state(expected))
    assert same(other.state_dict(), module.state_dict())
    assert callback.sparsity > 0.2


def every_epoch(optimizer):
    return StepLR(optimizer, 1, 0.8)


@pytest.mark.parametrize("kind", [Hooked, Bare])
@pytest.mark.parametrize("method", ["DST", "RigL"])
def test_a_schedule_that_has_taken_hold_of_the_step_changes_nothing_of_that(method, kind):
    expected, module, _ = unwrapped(method, every_epoch)
    callback, other, _ = trained(method, lambda p: kind(base(p)), every_epoch)
    assert same(state(callback), state(expected))
    assert same(other.state_dict(), module.state_dict())


@pytest.mark.parametrize("method", ["DST", "AutoSparse", "TopKAST", "SWAT"])
def test_what_a_wrapper_does_beside_the_step_is_done_to_the_latent_weights_and_thresholds(method):
    """Between a step by hand of the same in one optimizer and the wrapper there is no difference."""

    class InOne(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
            self.kept, self.count = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}, 0

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.kept.setdefault(p, p.detach().clone())
            loss = super().step(closure)
            self.count += 1
            for p, slow in self.kept.items() if self.count % 3 == 0 else ():
                p.lerp_(slow, 0.5)
                slow.copy_(p)
            return loss

    expected, _, _ = trained(method, InOne)
    callback, module, _ = trained(method, lambda p: Lookahead(base(p)))
    assert same(state(callback), state(expected))
    assert effective(module, callback)
    assert callback.sparsity > 0.1


@pytest.mark.parametrize("method", ["RigL", "RigL sparse", "SET", "GMP"])
def test_what_a_wrapper_does_beside_the_step_leaves_exact_zeros(method):
    callback, module, _ = trained(method, lambda p: Lookahead(base(p)))
    assert method == "RigL sparse" or effective(module, callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_slow_weights_of_connections_that_move_are_0():
    class Looks(pl.Callback):
        def on_before_optimizer_step(self, run, module, optimizer):
            mask, slow = callback.masks[name], optimizer.state[module.get_parameter(name)]["slow_params"]
            if self.before is not None and not torch.equal(mask, self.before):
                assert not slow[mask & ~self.before].any()
                assert not slow[self.before & ~mask].any()
                self.moves += 1
            self.before = mask

    name, callback, looks = "net.0.weight", METHODS["RigL"](), Looks()
    looks.before, looks.moves = None, 0
    fit([callback, looks], seeded(lambda: Lit(optimizer=lambda p: Lookahead(base(p)))))
    assert looks.moves > 2


@pytest.mark.parametrize("method", ["DST", "TopKAST"])
def test_a_run_with_a_wrapper_is_resumed(method, tmp_path):
    class Saves(Lookahead):
        """Its own state is in the checkpoint, too."""

        def state_dict(self):
            parameters = [p for group in self.param_groups for p in group["params"]]
            return {"base": self.base.state_dict(), "slow": [self.kept[p]["slow_params"] for p in parameters]}

        def load_state_dict(self, state_dict):
            self.base.load_state_dict(state_dict["base"])
            parameters = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(parameters, state_dict["slow"], strict=True):
                self.kept[p]["slow_params"] = slow.clone()

    whole, module, _ = trained(method, lambda p: Saves(base(p)))
    first = METHODS[method]()
    _, run = fit(
        first, seeded(lambda: Lit(optimizer=lambda p: Saves(base(p)))), loader(120), max_epochs=3, max_steps=15
    )
    run.save_checkpoint(tmp_path / "first.ckpt")
    callback, other = METHODS[method](), seeded(lambda: Lit(optimizer=lambda p: Saves(base(p))), 1)
    trainer(callback, max_epochs=3).fit(other, loader(120), ckpt_path=tmp_path / "first.ckpt", **PLAINLY)
    assert same(other.state_dict(), module.state_dict())
    assert same(state(callback), state(whole))


class ByHand(Lit):
    """Perturbs weights, and has the optimizer within make the step."""

    def __init__(self, optimizer):
        super().__init__(optimizer=optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            step()


class Sharpness(Hooked):
    """SAM as it is written everywhere."""

    @torch.no_grad()
    def first_step(self):
        self.old = {p: p.detach().clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        norm = torch.stack([p.grad.norm() for p in self.old]).norm()
        for p in self.old:
            p.add_(p.grad, alpha=0.01 / float(norm))

    @torch.no_grad()
    def second_step(self):
        for p, old in self.old.items():
            p.copy_(old)
        self.base.step()


@pytest.mark.parametrize("method", ["DST", "AutoSparse", "TopKAST", "RigL", "GMP"])
def test_a_step_that_is_made_by_the_optimizer_within_is_seen(method):
    callback = METHODS[method]()
    module, _ = fit(callback, seeded(lambda: ByHand(lambda p: Sharpness(base(p)))), max_epochs=3)
    assert effective(module, callback)
    assert callback.sparsity > 0.3


@pytest.mark.parametrize("method", ["DST", "STR", "TopKAST"])
def test_an_optimizer_that_puts_weights_back_within_its_step_is_refused(method):
    with pytest.raises(MisconfigurationException, match=rf"{method}.* Sharpness, which puts back.*first_step"):
        trained(method, lambda p: Sharpness(base(p)))


@pytest.mark.parametrize("method", ["DST", "RigL"])
def test_an_optimizer_that_lets_no_hook_in_is_refused_by_name(method):
    class Closed(Bare):
        @property
        def step(self):
            return self.base.step

    with pytest.raises(MisconfigurationException, match=rf"{method}.* Closed, which calls no hooks.*super\(\)"):
        trained(method, lambda p: Closed(base(p)))


@pytest.mark.parametrize("method", ["DST", "RigL"])
def test_a_step_that_is_exchanged_after_the_fit_has_started_is_refused_at_the_first_batch(method):
    class Exchanges(Lit):
        def on_train_start(self):
            plain = torch.optim.SGD(self.parameters(), lr=0.1)
            self.trainer.optimizers[0].step = plain.step

    callback = METHODS[method]()
    with pytest.raises(MisconfigurationException, match=rf"{method}.* acts around the step of SGD, but .* dense"):
        fit(callback, seeded(Exchanges))


def test_the_own_step_of_an_optimizer_comes_back_after_the_fit():
    callback, _, run = trained("DST", lambda p: Bare(base(p)))
    assert "step" not in vars(run.optimizers[0])
    assert callback.sparsity > 0
    _, _, run = trained("DST", lambda p: Bare(base(p)), every_epoch)
    assert not isinstance(getattr(vars(run.optimizers[0])["step"], "__self__", None), Bare)


def test_a_hook_below_another_one_is_silent_once_it_is_removed():
    optimizer, calls = Bare(base([torch.nn.Parameter(torch.ones(1))])), []
    (first,) = hook_step(optimizer, lambda *a: calls.append("first"), lambda *a: None)
    (second,) = hook_step(optimizer, lambda *a: calls.append("second"), lambda *a: None)
    assert isinstance(first, StepHook)
    optimizer.step()
    first.remove()
    optimizer.step()
    second.remove()
    optimizer.step()
    assert calls == ["second", "first", "second"]


def test_an_optimizer_without_a_state_dict_cannot_be_rewound():
    class Lost(Bare):
        def state_dict(self):
            return torch.optim.Optimizer.state_dict(self)

    with pytest.raises(MisconfigurationException, match=r"Lost cannot be rewound, .*_hooks.*super\(\).__init__"):
        trained("LotteryTicket", lambda p: Lost(base(p)))
