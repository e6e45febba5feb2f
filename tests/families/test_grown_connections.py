"""New connections move about as far as old ones, whatever the optimizer; grown_connections_script.py trains longer."""

import warnings

import grown_ranks
import pytest
import torch
from grown_connections_script import OPTIMIZERS, measure
from helpers import same
from processes import run_fresh_ranks

from lightning_sparse import DSR, GGR, ITOP, MEST, SET, SNFS, GraNet, MemoryEfficientDST, RigL

MOVES = {"update_every": 40, "stop_at": 1.0}
#: the optimizers, most with one of the two methods
PAIRS = [
    *((RigL, name) for name in ("Adam", "AdamW amsgrad", "NAdam", "RAdam", "RMSprop", "Adagrad")),
    *((SET, name) for name in ("Adam fused", "AdamW foreach", "NAdam", "Adamax", "RMSprop centered", "Adadelta")),
]
#: others, under AdamW
OTHERS = {
    "GGR": lambda: GGR(0.8, **MOVES, drop_fraction=0.3),
    "SNFS": lambda: SNFS(0.8, **MOVES),
    "DSR": lambda: DSR(0.8, **MOVES, init_threshold=0.02),
    "ITOP": lambda: ITOP(0.8, **MOVES),
    "MEST": lambda: MEST(0.8, **MOVES),
    "MemoryEfficientDST": lambda: MemoryEfficientDST(0.8, **MOVES),
    "GraNet": lambda: GraNet(0.8, update_every=40, end_at=0.5),
    "SET with sparse layers": lambda: SET(0.8, **MOVES, storage="sparse"),
}


def assert_quiet(callback, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        medians = measure(callback, OPTIMIZERS[optimizer], steps=80).medians()
    assert all(0.3 < ratio < 1.5 for ratio in medians), medians


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_new_connections_move_about_as_far_as_old_ones(method, optimizer):
    assert_quiet(method(0.8, **MOVES), optimizer)


@pytest.mark.parametrize("method", OTHERS)
def test_so_do_those_that_other_methods_grow(method):
    assert_quiet(OTHERS[method](), "AdamW")


def test_processes_start_what_they_grow_alike_to_the_last_bit(tmp_path):
    run_fresh_ranks(grown_ranks.run_all, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert same(*ranks)
    for method, found in ranks[0].items():
        alone = grown_ranks.train(method)
        torch.testing.assert_close(found["optimizer"], alone["optimizer"])
