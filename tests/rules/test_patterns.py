"""Patterns and tiles against loops over units."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import fits
from torch import nn

from lightning_sparse.rules import select
from lightning_sparse.rules.matrices import FIRST, Outputs, outputs_first
from lightning_sparse.rules.parts import WHOLE
from lightning_sparse.rules.patterns import NOfM, named
from lightning_sparse.rules.tiles import Tiles
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.units import units

# shapes whose (out, in) is (4, 12) in all groups, and where outputs lie
LAYOUTS = {
    "linear": ((4, 12), FIRST),
    "convolution": ((4, 12, 2, 1), FIRST),
    "transposed": ((24, 2, 1, 2), Outputs(1, groups=2)),
    "stacked": ((2, 12, 4), Outputs(2, groups=2, stacked=True)),
}
PLAIN = SimpleNamespace(outputs=FIRST, part=WHOLE)


def groups(shape, outputs, rows, columns):
    """The flat positions of each tile, by a loop; ``columns=None``: whole rows."""
    positions = outputs_first(torch.arange(math.prod(shape)).view(*shape), outputs)
    out, inputs = positions.shape[:2]
    positions = positions.reshape(out, inputs, -1)
    found = []
    for first in range(0, out, rows):
        if columns is None:
            found.append(positions[first : first + rows].flatten().tolist())
            continue
        for column in range(0, inputs, columns):
            block = positions[first : first + rows, column : column + columns]
            found += [block[..., k].flatten().tolist() for k in range(block.shape[-1])]
    return found


def weight(shape, outputs, active, seed=0):
    """A weight with some active connections, values and gradients all different."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    parameter = nn.Parameter(torch.randperm(size, generator=generator).add(1.0).view(*shape))
    parameter.grad = torch.randperm(size, generator=generator).add(1.0).view(*shape)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[active] = True
    mask = mask.view(*shape)
    parameter.data *= mask
    held = MaskedWeight("weight", mask, parameter, outputs=outputs)
    held.optimizer = torch.optim.SGD([parameter])
    return held


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 3), (2, 1), (1, None)])
def test_tiles_are_those_of_a_loop(layout, rows, columns):
    shape, outputs = LAYOUTS[layout]
    tiles = Tiles(shape, outputs, rows, columns)
    assert tiles.misfit is None
    found = groups(shape, outputs, rows, columns)
    assert math.prod(tiles.grid) == len(found)
    members = tiles.members(torch.arange(len(found)))
    assert [sorted(each) for each in members.tolist()] == [sorted(each) for each in found]
    assert torch.equal(tiles.of(members), torch.arange(len(found)).unsqueeze(1).expand_as(members))
    x = torch.randint(100, shape).float()
    assert tiles.sums(x).flatten().tolist() == [float(x.flatten()[each].sum()) for each in found]
    some = torch.rand(tiles.grid) < 0.5
    whole = tiles.whole(some)
    assert torch.equal(tiles.first(whole), some)
    assert tiles.fits(whole)
    whole.view(-1)[found[0][0]] ^= True
    assert not tiles.fits(whole) or tiles.size == 1


def test_what_cannot_be_divided_says_why():
    assert named("block:3x2").misfit((4, 6), FIRST, None) == "4 outputs, no multiple of 3"
    assert named("2:4").misfit((4, 6), FIRST, None) == "6 inputs, no multiple of 4"
    assert named("row").misfit((4,), FIRST, None) == "not a matrix of outputs and inputs"
    assert "norms along another dimension" in named("2:4").misfit((4, 4), FIRST, Outputs(1))
    assert named("2:4").misfit((4, 4), FIRST, FIRST) is None
    assert named("unstructured").misfit((4,), FIRST, Outputs(1)) is None


@pytest.mark.parametrize("name", ["4:2", "2:2", "0:4", "2:4:8", "block:16", "block:0x2", "rows", "", None, 24])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match='pattern must be "unstructured", "N:M" with N below M such as "2:4"'):
        named(name)


# ---------------------------------------------------------------------- N:M


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (1, 2)])
def test_the_largest_under_a_limit_are_those_of_a_greedy_loop(layout, n, m):
    shape, outputs = LAYOUTS[layout]
    size = math.prod(shape)
    scores = torch.randperm(size).float().view(*shape)
    found = groups(shape, outputs, 1, m)
    room = [n] * len(found)
    expected = []
    for position in scores.flatten().argsort(descending=True).tolist():
        group = next(i for i, each in enumerate(found) if position in each)
        if room[group]:
            room[group] -= 1
            expected.append(position)
    weight = SimpleNamespace(outputs=outputs, part=WHOLE)
    for k in (size // 5, size * n // m):
        mask = NOfM(n, m).top_k(weight, scores, k)
        assert select.positions(mask).tolist() == sorted(expected[:k])
        assert NOfM(n, m).fits(mask, outputs)
    more = NOfM(n, m).top_k(weight, scores, size * n // m + 2)
    others = [p for p in scores.flatten().argsort(descending=True).tolist() if p not in expected]
    assert select.positions(more).tolist() == sorted(expected + others[:2])


def test_layers_share_a_number_as_one_ranking_of_all_would():
    scores = [torch.randperm(64).float().view(4, 16), torch.randperm(32).add(0.5).view(4, 8) * 3]
    everywhere = [torch.ones_like(x, dtype=torch.bool) for x in scores]
    for k in (20, 48, 60):
        counts = NOfM(2, 4).count_global_top_k([PLAIN, PLAIN], scores, k, everywhere, [0, 0])
        first = [NOfM(2, 4).top_k(PLAIN, x, x.numel() // 2) for x in scores]
        key = torch.cat([(x + 1000 * mask).flatten() for x, mask in zip(scores, first, strict=True)])
        owners = key.argsort(descending=True)[:k] >= 64
        assert counts == [int((~owners).sum()), int(owners.sum())]


def test_equals_within_groups_leave_no_input_out():
    mask = NOfM(2, 4).top_k(PLAIN, torch.zeros(8, 8), 32)
    assert mask.sum(1).tolist() == [4] * 8
    assert mask.any(0).all()


@pytest.mark.parametrize(("layout", "n", "m"), [("convolution", 2, 4), ("stacked", 3, 4)])
def test_draws_are_even_and_never_above_the_limit(layout, n, m):
    shape, outputs = LAYOUTS[layout]
    size, generator, pattern = math.prod(shape), torch.Generator().manual_seed(0), NOfM(n, m)
    counts = torch.zeros(size)
    for _ in range(200):
        drawn = pattern.draw(size // 4, shape, generator, None, outputs)
        mask = torch.zeros(size, dtype=torch.bool).index_fill_(0, drawn, True)
        assert int(mask.sum()) == size // 4
        assert pattern.fits(mask.view(*shape), outputs)
        counts += mask
    assert fits(counts, torch.full((size,), 50.0))
    full = pattern.draw(size * n // m, shape, generator, None, outputs)
    mask = torch.zeros(size, dtype=torch.bool).index_fill_(0, full, True).view(*shape)
    assert set(Tiles(shape, outputs, 1, m).sums(mask).flatten().tolist()) == {n}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [2, 4])
def test_the_largest_of_each_group_is_that_of_a_loop(layout, m):
    shape, outputs = LAYOUTS[layout]
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    found = NOfM(1, m).maxima(SimpleNamespace(outputs=outputs), scores).flatten()
    for group in groups(shape, outputs, 1, m):
        assert (found[group] == scores.flatten()[group].max()).all()


def test_draws_leave_no_row_empty():
    drawn = NOfM(1, 4).draw(6, (6, 8), torch.Generator().manual_seed(0), FIRST)
    assert (drawn // 8).tolist() == list(range(6))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m", "share"), [(2, 4, 1.0), (2, 4, 0.6), (3, 4, 1.0), (3, 4, 0.7)])
def test_moves_are_those_of_a_loop_over_groups(layout, n, m, share):
    shape, outputs = LAYOUTS[layout]
    pattern, generator = NOfM(n, m), torch.Generator().manual_seed(1)
    active = pattern.draw(int(share * math.prod(shape) * n / m), shape, generator, None, outputs)
    held = weight(shape, outputs, active)
    found = groups(shape, outputs, 1, m)
    counts = [sum(p in set(active.tolist()) for p in each) for each in found]
    assert pattern.num_movable(held) == sum(min(a, m - a) for a in counts)

    W, dP = held.W.flatten(), held.dP.flatten()
    droppable = []
    for each, count in zip(found, counts, strict=True):
        lowest = sorted((p for p in each if held.mask.flatten()[p]), key=lambda p: W[p])
        droppable += lowest[: m - count]
    k = pattern.num_movable(held) // 2
    dropped = pattern.drop(held, held.magnitudes, k)
    assert dropped.tolist() == sorted(sorted(droppable, key=lambda p: W[p])[:k])

    lost = [sum(p in dropped for p in each) for each in found]
    room = [min(n - a + d, m - a) for a, d in zip(counts, lost, strict=True)]
    candidates = []
    for each, free in zip(found, room, strict=True):
        inactive = sorted((p for p in each if not held.mask.flatten()[p]), key=lambda p: -dP[p])
        candidates += inactive[:free]
    grown = pattern.grow_by_gradient(held, k, dropped)
    assert grown.tolist() == sorted(sorted(candidates, key=lambda p: -dP[p])[:k])

    at_random = pattern.grow_at_random(held, k, dropped, generator)
    assert len(set(at_random.tolist())) == k
    assert not held.mask.flatten()[at_random].any()
    held.rewire(dropped, at_random)
    assert held.num_active == len(active)
    assert pattern.fits(held.mask, outputs)


def test_a_row_that_must_not_be_empty_keeps_its_largest():
    held = weight((2, 8), FIRST, torch.tensor([0, 5, 8, 9]))
    held.nonempty = FIRST
    assert NOfM(2, 4).num_movable(held) == 2
    largest = [max(row, key=lambda p: held.W.flatten()[p]) for row in ((0, 5), (8, 9))]
    dropped = NOfM(2, 4).drop(held, held.magnitudes, 2)
    assert not set(largest) & set(dropped.tolist())


# ---------------------------------------------------------------------- blocks and rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["block:2x3", "row"])
def test_units_are_scored_dropped_and_grown_as_in_a_loop(layout, name):
    shape, outputs = LAYOUTS[layout]
    pattern = named(name)
    found = [sorted(each) for each in groups(shape, outputs, pattern.rows, pattern.columns)]
    active = list(range(0, len(found), 2))
    held = weight(shape, outputs, torch.tensor([p for unit in active for p in found[unit]]))
    (seen,) = units([held], pattern)
    assert (seen.size, seen.num_active, seen.num_inactive) == (len(found), len(active), len(found) - len(active))
    assert seen.active_indices.tolist() == active
    means = [float(held.W.flatten()[found[unit]].mean()) for unit in active]
    assert torch.allclose(seen.magnitudes, torch.tensor(means))
    of_gradients = [float(held.dP.flatten()[each].mean()) for each in found]
    assert torch.allclose(seen.gradient_magnitudes, torch.tensor([of_gradients[unit] for unit in active]))

    dropped = pattern.drop(seen, seen.magnitudes, 1)
    assert dropped.tolist() == [active[means.index(min(means))]]
    grown = pattern.grow_by_gradient(seen, 1, dropped)
    inactive = [unit for unit in range(len(found)) if unit not in active]
    assert grown.tolist() == [max(inactive, key=lambda unit: of_gradients[unit])]
    seen.rewire(dropped, grown)
    assert seen.active_indices.tolist() == sorted({*active, *grown.tolist()} - {*dropped.tolist()})
    assert pattern.fits(held.mask, outputs)
    assert held.num_active == len(active) * seen.tiles.size
