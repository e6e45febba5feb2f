"""Ties: an order that is even in rows and columns, and methods whose scores are all alike."""

import pytest
import torch
from by_hand import graded
from helpers import ROUNDS, SETTINGS, Lit, attached, fit, loader, seeded
from stored import METHODS as STORED
from torch import nn

from lightning_sparse import (
    GGR,
    GMP,
    ITOP,
    SNFS,
    SNIP,
    SWAT,
    GraNet,
    MemoryEfficientDST,
    RigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.families import magnitude
from lightning_sparse.rules import select, ties
from lightning_sparse.rules.budgets import apportion

# ---------------------------------------------------------------------- the order


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 10, 12])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 9, 27, 40])
def test_every_beginning_of_the_order_is_even_in_rows_and_columns(rows, columns):
    size = rows * columns
    order = ties.spread(torch.arange(size), (rows, columns))
    assert sorted(order.tolist()) == list(range(size)), "one number for each position"
    chosen = order.view(1, rows, columns) < torch.arange(size + 1).view(-1, 1, 1)
    for counts in (chosen.sum(1), chosen.sum(2)):
        assert (counts.amax(1) - counts.amin(1)).max() <= 1


def test_the_kernel_belongs_to_the_columns_and_a_vector_is_a_row():
    positions = torch.arange(8 * 6 * 3 * 3)
    assert torch.equal(ties.spread(positions, (8, 6, 3, 3)), ties.spread(positions, (8, 54)))
    assert torch.equal(ties.spread(positions, (432,)), ties.spread(positions, (1, 432)))


def test_no_order_is_asked_for_where_no_equals_are_left_over():
    def order(indices):
        raise AssertionError("it costs time")

    scores = torch.tensor([3.0, 1.0, 1.0, 0.0, 3.0])
    assert select.top_k_positions(scores, 2, order=order).tolist() == [0, 4]
    assert select.top_k_positions(scores, 4, order=order).tolist() == [0, 1, 2, 4]
    assert select.lowest_positions(scores, 3, order=order).tolist() == [1, 2, 3]


# ---------------------------------------------------------------------- methods whose scores are all alike


def evenness(mask):
    """By how much the numbers of connections of rows, and of columns, differ."""
    counts = [mask.flatten(1).sum(dim) for dim in (0, 1)]
    return [int(n.max() - n.min()) for n in counts]


class Zeroed(Lit):
    """A network whose last layer begins at zero, so that the gradients of the others are 0, too."""

    def __init__(self, lr=0.1):
        net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4))
        super().__init__(net, lambda parameters: torch.optim.SGD(parameters, lr))
        nn.init.zeros_(self.net[2].weight)


BEFORE = {
    "TopKAST": lambda: TopKAST(0.9, 0.8, distribution="uniform", update_every=9),
    "SWAT": lambda: SWAT(0.9, update_every=9),
    "SNIP": lambda: SNIP(0.9),
    "SynFlow": lambda: SynFlow(0.9, rounds=1),
}


@pytest.mark.parametrize("name", BEFORE)
def test_outputs_of_a_layer_that_begins_at_zero_get_equally_many_connections(name):
    """Where all scores of all layers are 0, as SNIP's and SynFlow's are, layers share in proportion to their sizes."""
    callback = BEFORE[name]()
    with pytest.warns(UserWarning, match=r"cannot rank all connections: within .*net\.2\.weight all scores are equal"):
        fit(callback, seeded(Zeroed), loader(40), max_steps=1)
    mask = callback.masks["net.2.weight"]
    assert mask.sum(1).tolist() == [4, 4, 4, 4]
    assert max(evenness(mask)) <= 1


MOVES = {
    "RigL": lambda: RigL(0.5),
    "ITOP": lambda: ITOP(0.5),
    "GGR": lambda: GGR(0.5, random_share=0.0),
    "SNFS": lambda: SNFS(0.5),
    "MemoryEfficientDST": lambda: MemoryEfficientDST(0.5, heuristic="random", subset_multiplier=9, scale_init=False),
}


@pytest.mark.parametrize("name", MOVES)
def test_connections_of_equal_magnitude_and_gradient_go_and_come_evenly(name):
    """Half of what the first rows hold goes; as many come where nothing was, in the order of ties."""
    active = torch.zeros(8, 10)
    active[:4] = 1.0
    callback = MOVES[name]()
    module, _, (weight,) = attached(callback, {"a": active.tolist()})
    graded(module, {"a": torch.zeros(8, 10).tolist()})
    callback.update([weight], 0.5, 1.0)
    rank = ties.spread(torch.arange(80), (8, 10)).view(8, 10)
    staying, free = rank[:4].flatten().sort().values[:20], rank[4:].flatten().sort().values[:20]
    assert torch.equal(weight.mask[:4], rank[:4] <= staying.max())
    assert torch.equal(weight.mask[4:], rank[4:] <= free.max())
    assert weight.mask.sum(1).tolist() == [5] * 8


@pytest.mark.parametrize("name", ["RigL", "GGR", "MemoryEfficientDST grabo", "MemoryEfficientDST synflow", "MEST"])
def test_equals_are_the_same_connections_with_both_stores(name):
    """Of a layer that begins at zero and of one whose gradients are 0, at a learning rate of 0."""
    masks = []
    for storage in ("masked", "sparse"):
        callback = STORED[name](storage=storage, update_every=3)
        module = seeded(lambda: Zeroed(lr=0.0).double())
        with pytest.warns(UserWarning, match="cannot rank all connections"):
            fit(callback, module, loader(64, dtype=torch.float64), precision="64-true", max_epochs=1)
        masks.append(callback.masks)
    for key, mask in masks[0].items():
        assert torch.equal(mask, masks[1][key])


@pytest.mark.parametrize("name", ["RigL", "GMP", "TopKAST", "SNIP", "LotteryTicket"])
@pytest.mark.filterwarnings("error:.*cannot rank")
def test_scores_that_differ_are_not_told_of(name):
    fit({**SETTINGS, **ROUNDS}[name](), seeded(Lit), loader(80), max_epochs=3)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_by_magnitude_keeps_equals_evenly_in_proportion_to_the_layers(scope):
    callback = GMP(0.9, scope=scope)
    shapes = {"a": (8, 12), "b": (4, 40), "c": (3, 5)}
    _, _, weights = attached(callback, {name: torch.ones(shape).tolist() for name, shape in shapes.items()})
    magnitude.prune(weights, callback.pattern, 100, 30, scope, "uniform", 0.0)
    sizes = [weight.size for weight in weights]
    assert [weight.num_active for weight in weights] == apportion(100, sizes, sizes)
    for weight in weights:
        assert max(evenness(weight.mask)) <= 1


def test_granet_regenerates_equals_evenly():
    active = torch.zeros(8, 10)
    active[:4] = 1.0
    callback = GraNet(0.5, drop_fraction=1.0)
    module, group, (weight,) = attached(callback, {"a": active.tolist()})
    graded(module, {"a": torch.zeros(8, 10).tolist()})
    group.step, group.values["asked"] = 1, 40
    type(callback).total_steps, kept = 1e9, type(callback).total_steps
    try:
        callback.move([weight], group, 1.0)
    finally:
        del type(callback).total_steps
        assert type(callback).total_steps is kept
    assert weight.mask.sum(1).tolist() == [0] * 4 + [10] * 4
