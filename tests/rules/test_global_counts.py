"""The count of one top-k over several layers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import apportion


def shares(scores, k, among):
    """How many of the k largest each layer has: those above the last one, and its share of the equals."""
    if k == 0:
        return [0] * len(scores)
    candidates = [s[a].tolist() for s, a in zip(scores, among, strict=True)]
    last = sorted((value for values in candidates for value in values), reverse=True)[k - 1]
    above = [sum(value > last for value in values) for values in candidates]
    equal = [values.count(last) for values in candidates]
    more = apportion(k - sum(above), equal, equal)
    return [n + m for n, m in zip(above, more, strict=True)]


scores_of_layers = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4)


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_are_those_of_one_over_all_layers(layers, draw):
    """With ties, of which each layer gets a share in proportion to how many it has."""
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.tensor(draw.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in scores]
    k = draw.draw(st.integers(0, sum(map(select.count, among))))
    assert select.count_global_top_k(iter(scores), k, among) == shares(scores, k, among)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("kind", ["normal", "few values", "equal", "not finite"])
def test_many_scores_are_counted_as_few_are(share, kind):
    """A sample tells which need not be looked at."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(70000, generator=generator), torch.randn(90000, generator=generator).mul_(2)]
    if kind in ("few values", "equal"):
        scores = [x.round().mul_(kind == "few values") for x in scores]
    if kind == "not finite":
        scores[0][::7], scores[1][::9] = math.nan, -math.inf
    among = [torch.rand(len(x), generator=generator) < 0.9 for x in scores]
    k = int(share * sum(map(select.count, among)))
    numbers = [x.nan_to_num(math.inf, math.inf, -math.inf) for x in scores]
    assert select.count_global_top_k(scores, k, among) == shares(numbers, k, among)


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_keep_what_each_layer_needs(layers, draw):
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.ones(len(s), dtype=torch.bool) for s in scores]
    least = [draw.draw(st.integers(0, len(s))) for s in scores]
    k = draw.draw(st.integers(sum(least), sum(map(len, scores))))
    sure = [select.top_k(s, n) for s, n in zip(scores, least, strict=True)]
    rest = shares(scores, k - sum(least), [~mask for mask in sure])
    assert select.count_global_top_k(scores, k, among, least) == [n + m for n, m in zip(least, rest, strict=True)]


@given(st.lists(st.integers(-1, 4), max_size=40), st.data())
def test_the_largest_of_blocks_are_those_of_the_whole(scores, draw):
    """With ties, and marks of what is no candidate."""
    whole = torch.tensor(scores, dtype=torch.float32)
    shape = (len(scores) // 4, 4) if len(scores) % 4 == 0 else (len(scores),)
    edges = [0, *sorted(draw.draw(st.lists(st.integers(0, len(scores)), max_size=5))), len(scores)]
    blocks = [(a, whole[a:b]) for a, b in pairwise(edges)]
    at_least = draw.draw(st.sampled_from([0.0, 1.0, 3.0]))
    candidates = whole >= at_least
    k = draw.draw(st.integers(0, select.count(candidates)))
    expected = select.top_k_positions(whole.view(shape), k, among=candidates.view(shape))
    for asked in {k, 50} if k == select.count(candidates) else {k}:
        positions, values = select.largest(blocks, asked, shape, at_least)
        assert torch.equal(positions, expected)
        assert torch.equal(values, whole[expected])


def test_blocks_may_tell_themselves_what_reaches_a_bound():
    """The bound rises with what has been found."""
    scores, bounds = torch.tensor([[4.0, 1.0, 2.0], [3.0, 2.0, 5.0], [1.0, 2.0, 4.5]]), []

    def block(row, bound):
        bounds.append(bound)
        found = (scores[row] >= bound).nonzero().squeeze(1)
        return found + 3 * row, scores[row][found]

    positions, values = select.largest_of((partial(block, row) for row in range(3)), 2, (3, 3), 1.5)
    assert positions.tolist() == [5, 8]
    assert values.tolist() == [5.0, 4.5]
    assert bounds == [1.5, 1.5, 4.0]


def test_of_many_scores_most_are_chosen_as_few_are():
    """A sample helps with few alone."""
    scores = torch.randint(50, (3, 1 << 16), generator=torch.Generator().manual_seed(0)).float()
    order = scores.flatten().sort(descending=True, stable=True).values
    for k in (1000, 100_000, 190_000):
        found = select.top_k_positions(scores, k)
        assert torch.equal(scores.flatten()[found].sort(descending=True).values, order[:k])
        rest = torch.ones(scores.numel(), dtype=torch.bool)
        rest[found] = False
        lowest = select.lowest_positions(scores, scores.numel() - k)
        assert torch.equal(select.positions(rest), lowest)
