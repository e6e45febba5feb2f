"""ITOP: what has been active, and its share."""

import lightning.pytorch as pl
import pytest
from by_hand import DP, W, graded
from helpers import attached, fit, grid, loader

from lightning_sparse import ITOP
from lightning_sparse.accounting.masks import mask_bits

# ---------------------------------------------------------------------- worked out by hand


def test_itop_remembers_what_has_been_active():
    callback = ITOP(0.5)
    module, _, weights = attached(callback, W)
    graded(module, DP)
    callback.explored.start(weights[0].name, weights[0].active_indices, 8)
    assert callback.exploration_rate == 0.5
    callback.update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert callback.exploration_rate == 0.75
    assert ITOP(0.5, growth="random").skips_update is False
    with pytest.raises(RuntimeError, match="no weights yet"):
        _ = ITOP(0.5).exploration_rate


# ---------------------------------------------------------------------- ITOP, MEST, DeepR


def test_itop_keeps_no_positions_before_an_update():
    class Looks(pl.Callback):
        def on_train_start(self, run, module):
            assert all(weight._indices is None for weight in callback._weights.values())
            looked.append(callback.exploration_rate)

    callback, looked = ITOP(0.75), []
    fit([callback, Looks()], max_steps=1)
    assert looked == [0.25]


def test_itop_explores_more_and_more_and_logs_it(tmp_path):
    logged = []

    class Rate(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.append(callback.exploration_rate)

    callback = ITOP(0.9, growth="random", update_every=5, decay="none")
    fit([callback, Rate()], train=loader(80), max_epochs=4)
    assert logged == sorted(logged)
    assert 0.1 < logged[0] < logged[-1] < 1
    assert callback.extra_metrics == {"sparsity/explored": callback.exploration_rate}
    ever = callback.state_dict()["explored"]["bits"]["net.0.weight"]
    assert (ever | ~mask_bits(callback.masks["net.0.weight"]) == 255).all()


def test_itop_tells_the_papers_interval_of_its_growth_rule():
    assert ITOP(0.9, growth="random").paper_update_every == 1500
    assert ITOP(0.9, growth="gradient").paper_update_every == 4000
