"""What other code writes into weights during a fit is gone on with, also by methods with latent weights."""

import copy
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers import LATENT, PLAINLY, SETTINGS, Lit, effective, fit, loader, same, seeded, state, trainer
from torch import nn

from lightning_sparse.trainer.written import Looks, Traces

METHODS = ["DST", "DFBST", "STR", "AutoSparse", "TopKAST", "SWAT", "OptG"]
KEPT = {  # nothing but the written weight decides what the layers compute with
    "DST": lambda: SETTINGS["DST"](alpha=0.0),
    "DFBST": lambda: SETTINGS["DFBST"](alpha=0.0),
    "STR": lambda: SETTINGS["STR"](),
    "AutoSparse": lambda: SETTINGS["AutoSparse"](),
    "TopKAST": lambda: SETTINGS["TopKAST"](sparsity=0.5, backward_sparsity=0.2, power=2.0),
    "SWAT": lambda: SETTINGS["SWAT"](),
    "OptG": lambda: SETTINGS["OptG"](),
}


def still(parameters):
    """Steps that leave weights where they are."""
    return torch.optim.SGD(parameters, lr=0.0)


class Writes(Lit):
    """Calls ``write(module)`` where ``at`` says; keeps what the first layer computed with in the batch after that."""

    def __init__(self, write, at="on_train_start", when=0, optimizer=None):
        super().__init__(optimizer=optimizer)
        self.write, self.when, self.seen = write, when, None

        def hook(*args):
            if self.global_step == self.when and self.seen is None:
                self.write(self)

        setattr(self, at, hook)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == self.when:
            self.seen = self.net[0].weight.detach().clone()
        return loss


def dense(module):
    return torch.linspace(-1, 1, 192).view(16, 12)


def load(module):
    module.load_state_dict({**module.state_dict(), "net.0.weight": dense(module)})


def fill_data(module):
    module.net[0].weight.data.copy_(dense(module))


def exchange_data(module):
    module.net[0].weight.data = dense(module)


@pytest.mark.parametrize("at", ["on_fit_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("write", [load, fill_data, exchange_data])
@pytest.mark.parametrize("method", METHODS)
def test_pretrained_weights_that_are_loaded_after_the_fit_has_begun_are_the_latent_ones(method, write, at):
    callback = KEPT[method]()
    module = seeded(lambda: Writes(write, at, optimizer=still))
    fit(callback, module, loader(16), max_epochs=1)
    W, P = callback.latents["net.0.weight"], module.net[0].weight
    wanted = dense(module)
    mask = callback.masks["net.0.weight"]
    assert effective(module, callback)
    torch.testing.assert_close(P[mask], wanted[mask])
    assert mask.float().mean() > 0.15
    if method in ("TopKAST", "SWAT"):
        assert wanted[mask].abs().min() >= wanted[~mask].abs().max(), "the largest of what was written"
    if method in ("DST", "DFBST", "OptG", "SWAT"):
        assert torch.equal(W, wanted)


def projections(P):
    return {
        "clamp_": lambda: P.clamp_(-0.15, 0.15),
        "max norm": lambda: P.copy_(torch.renorm(P, 2, 0, 0.4)),
        "data clamp_": lambda: P.data.clamp_(-0.15, 0.15),
        "scale": lambda: P.mul_(0.9),
    }


@pytest.mark.parametrize("kind", ["clamp_", "max norm", "data clamp_", "scale"])
@pytest.mark.parametrize("method", METHODS)
def test_a_projection_of_the_weights_holds_and_leaves_inactive_latent_weights_alone(method, kind):
    """Of what is made smaller, hard thresholds still take away what is not above them."""

    class Projects(Lit):
        @torch.no_grad()
        def on_train_batch_end(self, *args):
            if self.global_step == 20:
                self.before, self.mask = callback.latents[name].clone(), callback.masks[name]
                projections(self.net[0].weight)[kind]()
                self.wanted = self.net[0].weight.clone()

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 20:
                self.after = callback.latents[name].clone()
                self.t = getattr(callback, "effective_thresholds", {}).get(name)
                self.t = None if self.t is None else self.t.clone()
                self.now = self.net[0].weight.detach().clone()

    name, callback = "net.0.weight", SETTINGS[method]()
    module = seeded(Projects)
    fit([callback, Always()], module, max_epochs=1)
    kept = module.now != 0
    torch.testing.assert_close(module.now[kept], module.wanted[kept])
    if method in ("DST", "DFBST"):
        assert torch.equal(kept, module.wanted.abs() > module.t[:, None])
    else:
        assert torch.equal(kept, module.mask)
    assert kept.any()
    assert not torch.equal(module.after[module.mask], module.before[module.mask])
    assert torch.equal(module.after[~module.mask], module.before[~module.mask])
    assert effective(module, callback)


class Always(pl.Callback):
    """Has values compared at every step, as after the first write through ``.data``."""

    def on_train_start(self, run, module):
        for callback in run.callbacks:
            if hasattr(callback, "_fit"):
                callback._fit.looks.always()


@pytest.mark.parametrize("method", METHODS)
def test_clamping_through_data_in_each_batch_is_noticed_from_the_first_on(method):
    class Clamps(Lit):
        largest = 0.0

        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].weight.data.clamp_(-0.05, 0.05)

        def on_before_optimizer_step(self, optimizer):
            limit = max(self.largest, float(self.net[0].weight.abs().max()))
            self.largest = limit

    callback, module = SETTINGS[method](), seeded(Clamps)
    fit(callback, module, max_epochs=1)
    assert module.largest <= 0.0501
    mask = callback.masks["net.0.weight"]
    assert callback.latents["net.0.weight"][mask].abs().max() < 0.6
    assert effective(module, callback)


@pytest.mark.parametrize("method", METHODS)
def test_a_rollback_brings_the_weights_of_then_back(method):
    class Rolls(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 10:
                self.then = copy.deepcopy(self.state_dict())
            if self.global_step == 25:
                self.load_state_dict(self.then)

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 25:
                self.now = self.net[0].weight.detach().clone()

    callback, module = SETTINGS[method](), seeded(Rolls)
    fit(callback, module, max_epochs=1)
    then = module.then["net.0.weight"]
    both = (then != 0) & (module.now != 0)
    torch.testing.assert_close(module.now[both], then[both])
    share = 0.2 if method == "OptG" else 0.6  # its schedule has gone on
    assert both.sum() >= share * (then != 0).sum(), "most of the connections of then"
    assert effective(module, callback)


@pytest.mark.parametrize("method", METHODS)
def test_an_average_that_is_written_back_is_gone_on_with(method):
    """Polyak: each epoch ends at the average of its steps."""

    class Polyak(Lit):
        average, count = None, 0

        def on_train_batch_end(self, *args):
            P = self.net[0].weight.detach().clone()
            self.count += 1
            self.average = P if self.average is None else self.average + (P - self.average) / self.count

        def on_train_epoch_end(self):
            self.net[0].weight.data.copy_(self.average)
            self.wanted = self.average

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 30:
                kept = (self.net[0].weight != 0) & (self.wanted != 0)
                torch.testing.assert_close(self.net[0].weight[kept], self.wanted[kept])
                self.looked = int(kept.sum())

    callback, module = SETTINGS[method](), seeded(Polyak)
    fit(callback, module, max_epochs=2)
    assert module.looked > 10
    assert effective(module, callback), "also after the last epoch"


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_are_reset_begin_anew(method):
    class Resets(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                torch.manual_seed(5)
                self.net[0].reset_parameters()
                self.wanted = self.net[0].weight.detach().clone()

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 30:
                self.now, self.W = self.net[0].weight.detach().clone(), callback.latents["net.0.weight"].clone()

    callback, module = SETTINGS[method](), seeded(Resets)
    fit(callback, module)
    kept = module.now != 0
    torch.testing.assert_close(module.now[kept], module.wanted[kept])
    assert kept.any()
    assert module.W.count_nonzero() == module.W.numel()


@pytest.mark.parametrize("method", ["RigL", "SET", "GMP"])
def test_methods_with_masks_keep_their_connections_and_say_what_was_lost(method):
    callback = SETTINGS[method]()
    module = seeded(lambda: Writes(load, "on_train_batch_start", 25))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, module, max_epochs=2)
    lost = [str(w.message) for w in caught if "that other code wrote into net.0.weight" in str(w.message)]
    assert len(lost) == 1
    assert "initial='zeros'" in lost[0]
    assert effective(module, callback)


@pytest.mark.parametrize("method", ["RigL", "FixedMask"])
def test_with_masks_the_first_forward_pass_is_sparse_again(method):
    class Loads(Lit):
        def on_train_start(self):
            fill_data(self)

        def training_step(self, batch, batch_idx):
            assert effective(self, callback)
            return super().training_step(batch, batch_idx)

    callback = SETTINGS[method]()
    module, _ = fit(callback, seeded(lambda: Loads(optimizer=still)), loader(16), max_epochs=1)
    mask = callback.masks["net.0.weight"]
    assert torch.equal(module.net[0].weight[mask], dense(module)[mask])


def test_values_of_a_sparse_layer_are_the_weights():
    class Fills(Lit):
        @torch.no_grad()
        def on_train_start(self):
            self.net[0].values.fill_(0.25)

    callback = SETTINGS["SET"](storage="sparse")
    module, _ = fit(callback, seeded(lambda: Fills(optimizer=still)), loader(16), max_epochs=1)
    W = module.net[0].weight if hasattr(module.net[0], "weight") else module.net[0].values
    assert set(W.detach().flatten().tolist()) <= {0.0, 0.25}


def test_what_a_frozen_mask_leaves_out_is_told_of():
    class Loads(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                load(self)

    callback = SETTINGS["DST"](alpha=None, sparsity=0.8, end_at=0.4)
    with pytest.warns(UserWarning, match=r"other code wrote into net\.0\.weight outside of its mask"):
        module, _ = fit(callback, seeded(Loads))
    assert effective(module, callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_checkpoint_that_is_written_after_a_write_holds_both_alike(tmp_path):
    class Saves(pl.Callback):
        def on_train_epoch_end(self, run, module):
            module.net[0].weight.data.clamp_(-0.02, 0.02)
            run.save_checkpoint(path)

    class First(pl.Callback):
        def on_train_start(self, run, module):
            self.weight = module.net[0].weight.detach().clone()

    path, first = tmp_path / "clamped.ckpt", First()
    fit([SETTINGS["STR"](), Saves()], max_epochs=1)
    saved = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"]
    assert 0.0199 < saved.abs().max() < 0.0201
    trainer([SETTINGS["STR"](), first], max_epochs=2).fit(seeded(Lit, 3), loader(), ckpt_path=path, **PLAINLY)
    assert torch.equal(first.weight, saved)


@pytest.mark.parametrize("method", [*LATENT, "RigL", "GMP", "DeepR"])
def test_where_nobody_writes_nothing_is_found_and_nothing_changes(method, caplog):
    def trained(*more):
        callback = SETTINGS[method]()
        module, _ = fit([callback, *more], max_epochs=2)
        return module.state_dict(), state(callback)

    plain = trained()
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = trained(Always())
    assert same(plain, watched)
    assert "other code" not in caplog.text
    assert not [w for w in caught if "other code" in str(w.message)]


def test_an_operation_in_place_leaves_a_trace_and_one_through_data_does_not():
    parameter, traces = nn.Parameter(torch.ones(3)), Traces()
    traces.note(parameter)
    parameter.data.mul_(2)
    assert not traces.differs(parameter)
    with torch.no_grad():
        parameter.mul_(2)
    assert traces.differs(parameter)
    traces.note(parameter)
    parameter.data = torch.ones(3)
    assert traces.differs(parameter)


def test_values_are_compared_at_the_start_seldom_later_and_always_once_it_paid():
    looks = Looks()
    assert looks.fresh
    due = [looks.due() for _ in range(256)]
    assert due == [True] + [False] * 254 + [True]
    assert not looks.fresh
    looks.soon()
    assert looks.fresh
    assert [looks.due(), looks.due()] == [True, False]
    looks.always()
    assert looks.due()
