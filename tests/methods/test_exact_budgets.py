"""Methods with a given sparsity have just the weights asked for, on networks of all kinds.

Those that prune and grow are tested in ``test_prune_and_grow``, after more frequent updates, and GMP in
``test_gradual``.
"""

from itertools import product

import pytest
import torch
from helpers import MASKED, NETS, ROUNDS, TOP_K, watched

from lightning_sparse import MemoryEfficientDST
from lightning_sparse.rules.budgets import budget

BEFORE = ("RandomPruning", "OneShot", "SNIP", "GraSP", "SynFlow")
# These come to their budget while they train.
DENSE_TO_SPARSE = ("GraNet", "OptG", "LotteryTicket")
METHODS = {name: lambda s, name=name: {**MASKED, **TOP_K}[name](sparsity=s) for name in (*BEFORE, "SWAT", "OptG")}
METHODS["TopKAST"] = lambda s: TOP_K["TopKAST"](sparsity=s, backward_sparsity=s / 2)
METHODS["GraNet"] = lambda s: MASKED["GraNet"](sparsity=s, initial_sparsity=0.0)
METHODS["LotteryTicket"] = lambda s: ROUNDS["LotteryTicket"](sparsity=s)
for heuristic in ("random", "grabo", "synflow"):
    METHODS[f"MemoryEfficientDST-{heuristic}"] = lambda s, heuristic=heuristic: MemoryEfficientDST(
        s, heuristic=heuristic, update_every=7
    )


@pytest.mark.parametrize(("net", "sparsity"), [*product(NETS, [0.9]), ("cnn", 0.5), ("cnn", 0.99)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*has no weight left")
@pytest.mark.filterwarnings("ignore:.*draws the endpoints of some weights uniformly")
def test_the_budget_is_exact(method, net, sparsity):
    watch, _, _ = watched(METHODS[method](sparsity), NETS[net], 10, max_epochs=3 if method in ROUNDS else 2)
    size = sum(mask.numel() for mask in watch.callback.masks.values())
    counts = [sum(layers) for layers in watch.counts]
    assert counts[-1] == budget(sparsity, size) == size - round(sparsity * size)
    if method in DENSE_TO_SPARSE:
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == size
    else:
        assert set(counts) == {counts[-1]}
    if sparsity == 0.5:  # higher ones may leave these narrow networks dead
        first, last = watch.masks[0], watch.masks[-1]
        moved = any(not torch.equal(mask, last[name]) for name, mask in first.items())
        assert moved == (method not in BEFORE)
