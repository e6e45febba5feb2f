"""What is said, and kept, when weights or gradients are not finite."""

import math
import warnings

import lightning.pytorch as pl
import pytest
from helpers import HOOKED, MASKED, REPRESENTATIVES, ROUNDS, SETTINGS, Lit, fit, loader, seeded
from stored import METHODS as STORED

from lightning_sparse import STR, LotteryTicket

ALL = {**SETTINGS, **ROUNDS}
SCORED = ("SNIP", "GraSP", "SynFlow")
GRADUAL = ("GMP", "GraNet")


def values(module):
    """The second layer's weight, whatever holds it."""
    return next(p for name, p in module.named_parameters() if name in ("net.2.weight", "net.2.values"))


class Breaks(pl.Callback):
    """Writes a value that is not finite into the second layer, or into its gradient, from the fifth step on."""

    def __init__(self, where, value):
        self.where, self.value = where, value

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.where == "weight" and trainer.global_step == 4:
            W = values(module).detach().view(-1)
            W[W.nonzero()[0]] = self.value

    def on_after_backward(self, trainer, module):
        if self.where == "gradient" and trainer.global_step >= 4:
            values(module).grad.view(-1)[values(module).detach().view(-1).nonzero()[0]] = self.value


def told(callback, where, value, max_epochs=3):
    """What is said in a short training that breaks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([Breaks(where, value), callback], seeded(Lit), loader(80), max_epochs=max_epochs)
    return [str(w.message) for w in caught]


def about(messages, *parts):
    return [message for message in messages if all(part in message for part in parts)]


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        *((name, "weight", math.nan) for name in ALL),
        *((name, "gradient", value) for name in (*REPRESENTATIVES, *HOOKED) for value in (math.nan, math.inf)),
    ],
)
def test_a_training_that_is_not_finite_is_told_of_by_weight_and_remedy_and_nothing_else_is_blamed(name, where, value):
    callback = ALL[name]()
    messages = told(callback, where, value)
    (message,) = about(messages, "has weights that are not finite")
    assert "net.2.weight" in message
    for remedy in ("learning rate", "gradient_clip_val", "float32"):
        assert remedy in message
    for wrong in ("collapsed", "no weight left", "planned", "really trained", "Please report"):
        assert not about(messages, wrong), "another cause and remedy"


@pytest.mark.parametrize("name", sorted(MASKED))
def test_the_budget_stays_exact_whatever_is_no_number(name):
    callback = MASKED[name]()
    told(callback, "weight", math.nan)
    size, active = callback.size, sum(callback.layer_count.values())
    if name in GRADUAL:
        start = size // 2 if name == "GraNet" else size
        assert active == callback._groups.value("asked", start), "the plan's present number"
    else:
        assert active == size - round(0.8 * size)


@pytest.mark.parametrize("name", ["RigL", "SET", "GGR", "MEST soft bound"])
def test_with_sparse_storage_the_same_is_told(name):
    messages = told(STORED[name](storage="sparse"), "gradient", math.nan)
    assert "net.2.weight" in about(messages, "has weights that are not finite")[0]


@pytest.mark.parametrize("name", ["RigL", *GRADUAL])
def test_connections_that_cannot_move_are_told_of_by_the_gradient_that_is_to_blame(name):
    messages = told(MASKED[name](), "gradient", math.inf)
    (message,) = about(messages, "moved no connections since gradients are not finite", "net.2.weight")
    assert "gradient_clip_val" in message
    ended = about(messages, "active weights, not")
    assert len(ended) == (name in GRADUAL)
    assert all("gradients of" in message and "gradient_clip_val" in message for message in ended)


def test_lottery_tickets_are_drawn_also_from_weights_that_are_not_finite():
    callback = ROUNDS["LotteryTicket"]()
    messages = told(callback, "weight", math.nan)
    assert about(messages, "has weights that are not finite")
    assert sum(callback.layer_count.values()) == callback.size - round(0.8 * callback.size)


@pytest.mark.parametrize("name", ["DST", "DFBST"])
def test_gradients_of_thresholds_are_told_of_by_weight(name):
    (message,) = about(told(SETTINGS[name](), "gradient", math.nan), "Gradients were not finite")
    assert "net.2.weight" in message


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_told_of_by_weight(name):
    module = seeded(Lit)
    module.net[2].weight.data[0, 0] = math.nan
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"scores of net\.\d\.weight .* NaN"):
        fit(MASKED[name](), module, loader(80))


def test_weights_that_are_no_number_rank_first():
    callback = SETTINGS["TopKAST"](sparsity=0.9, backward_sparsity=0.8)
    module = seeded(Lit)
    module.net[0].weight.data[1, 2] = math.nan
    fit(callback, module, loader(8), max_epochs=1)
    assert callback.masks["net.0.weight"][1, 2]


class Diverges(Lit):
    """Its loss is not finite from a step on."""

    since, value = 0, math.nan

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.global_step >= self.since else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("since", [0, 15])
@pytest.mark.parametrize("name", ["LotteryTicket", "LotteryTicket by layer", "DST", "STR with a target"])
def test_a_training_of_which_nothing_is_finite_ends_and_names_weights_and_remedy_and_no_collapse(name, since, value):
    build = {
        "LotteryTicket by layer": lambda: LotteryTicket(0.8, rounds=2, scope="layer", min_layer_density=0.01),
        "STR with a target": lambda: STR(sparsity=0.8),
    }
    module = seeded(Diverges)
    module.since, module.value = since, value
    callback = {**ALL, **build}[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, module, loader(80), max_epochs=3)
    messages = [str(w.message) for w in caught]
    assert about(messages, "has weights that are not finite", "net.0.weight", "Lower the learning rate")
    assert not about(messages, "collapsed")
    assert not about(messages, "has no weight left")
    if name != "DST":
        assert sum(callback.layer_count.values()) == callback.size - round(0.8 * callback.size)
