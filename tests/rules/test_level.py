"""Where to cut margins: against sorting all of them, with floors, ties and what is not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.rules.even import evenly
from lightning_sparse.rules.level import Cut, Look, Near, cuts


def looking(layers):
    """Return what ``cuts`` asks for, and a list of where it has looked."""
    looks = []

    def near(look):
        looks.append(look)
        low, high = look.bounds
        looked_at = [each[(each > low) & (each <= high)] for each in layers]
        above = [int((each > high).sum()) for each in layers]
        return Near(above, [len(each) for each in looked_at], torch.cat(looked_at).numpy())

    return near, looks


def drawn(sizes, seed, decimals=12):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).mul(0.1).round(decimals=decimals) for n in sizes]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


centres, widths = st.sampled_from([0.0, -0.05, 3.0]), st.sampled_from([1e-6, 1e-2, 10.0])


@given(sizes=sizes, seed=st.integers(0, 10**6), share=st.floats(0, 1), centre=centres, width=widths)
def test_exactly_k_margins_are_above_the_level_wherever_it_looks_first(sizes, seed, share, centre, width):
    layers = drawn(sizes, seed)
    k = max(1, round(share * sum(sizes)))
    near, _ = looking(layers)
    found, _ = cuts(near, k, [0] * len(sizes), Look(centre, width))
    assert len({cut.level for cut in found}) == 1
    assert sum(int((each > cut.level).sum()) for each, cut in zip(layers, found, strict=True)) == k
    ranked = torch.cat(layers).sort(descending=True).values
    assert found[0] == Cut(float(ranked[k]) if k < len(ranked) else -math.inf, float(ranked[k - 1]), k)


@given(sizes=sizes, seed=st.integers(0, 10**6), share=st.floats(0, 1), floor=st.floats(0, 1))
def test_each_layer_has_what_it_has_at_least_and_the_others_share_the_rest(sizes, seed, share, floor):
    layers = [each + i * 0.05 for i, each in enumerate(drawn(sizes, seed))]
    lowest = [math.ceil(floor * n) for n in sizes]
    k = max(1, sum(lowest), round(share * sum(sizes)))
    near, _ = looking(layers)
    found, _ = cuts(near, k, lowest, Look())
    counts = [int((each > cut.level).sum()) for each, cut in zip(layers, found, strict=True)]
    assert sum(counts) == k
    assert all(n >= low for n, low in zip(counts, lowest, strict=True))
    common = max((cut.level for cut, n, low in zip(found, counts, lowest, strict=True) if n > low), default=None)
    for each, cut, n, low in zip(layers, found, counts, lowest, strict=True):
        if common is not None and cut.level != common:
            assert n == low
            assert int((each > common).sum()) < low


@given(seed=st.integers(0, 10**6), k=st.integers(1, 60))
def test_all_that_are_equal_to_the_least_are_above(seed, k):
    (layer,) = drawn([60], seed, decimals=1)
    found, _ = cuts(looking([layer])[0], k, [0], Look())
    assert int((layer > found[0].level).sum()) == int((layer >= layer.sort(descending=True).values[k - 1]).sum())


def test_a_level_that_holds_is_left_alone():
    layers = [torch.tensor([0.3, -0.2, 0.1, -0.4], dtype=torch.float64)]
    assert cuts(looking(layers)[0], 2, [0], Look(0.0, 0.01))[0][0].level == 0.0


def test_infinite_margins_come_first_and_fewer_than_asked_for_all_pass():
    layers = [torch.tensor([math.inf, 0.3, -0.2], dtype=torch.float64)]
    near, _ = looking(layers)
    assert int((layers[0] > cuts(near, 1, [0], Look(0.0, 1.0))[0][0].level).sum()) == 1
    assert int((layers[0] > cuts(near, 5, [0], Look(0.0, 1.0))[0][0].level).sum()) == 3


def test_it_looks_once_and_at_few_where_the_level_is_much_the_same():
    (layer,), look = drawn([20_000], 1), Look()
    for _ in range(24):
        near, looks = looking([layer + 1e-3])
        (cut,), look = cuts(near, 2_000, [0], look)
        layer = layer + 1e-3 - cut.level  # as thresholds are shifted
    assert len(looks) == 1
    assert len(near(look).values) < 20


def test_it_looks_once_in_nearly_all_steps_where_the_level_wavers():
    generator, (layer,), look, number = torch.Generator().manual_seed(0), drawn([20_000], 1), Look(), 0
    for by in torch.randn(200, generator=generator, dtype=torch.float64).mul(1e-3).tolist():
        near, looks = looking([layer + by])
        _, look = cuts(near, 2_000, [0], look)
        number += len(looks)
    assert number <= 215
    assert len(near(look).values) < 1_000


def test_few_looks_after_a_jump_find_many():
    (layer,), look, found = drawn([20_000], 1), Look(), []
    layer = layer - 200.0  # as thresholds of a dense start come to their first cut
    for _ in range(12):
        near, _ = looking([layer])
        found.append(len(near(look).values))
        (cut,), look = cuts(near, 2_000, [0], look)
        layer = layer - cut.level - 1e-5
    assert sum(n > 1_000 for n in found) <= 2


def test_a_look_at_everything_is_followed_by_narrower_ones():
    look = Look(0.0, math.inf)
    for _ in range(60):
        look = look.next([Cut(-5.001, -5.0, 1)])
    assert 0 < look.width < 1e-2


@pytest.mark.parametrize(("n", "k"), [(0, 0), (7, 7), (1000, 10), (1000, 999)])
def test_an_even_spread_has_its_number_and_is_spread_over_rows(n, k):
    chosen = evenly(n, k)
    assert len(chosen.unique()) == k
    parts = torch.histc(chosen.double(), 5, 0, max(n, 1))
    assert parts.max() - parts.min() <= 2
