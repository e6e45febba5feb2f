"""Transposable masks against a search by hand."""

import itertools

import pytest
import torch

from lightning_sparse.rules.matrices import FIRST, Outputs
from lightning_sparse.rules.transposable import largest_tiles, tiles


@pytest.mark.parametrize(("n", "number"), [(1, 24), (2, 90), (3, 24)])
def test_all_tiles_are_there_once(n, number):
    every = tiles(n)
    assert len(every.flatten(1).unique(dim=0)) == len(every) == number
    assert (every.sum(1) == n).all()
    assert (every.sum(2) == n).all()


def test_the_best_of_one_in_each_row_is_the_best_permutation():
    scores = torch.rand(4, 8)
    mask = largest_tiles(scores, FIRST, 1)
    for column in (0, 4):
        tile = scores[:, column : column + 4]
        best = max(itertools.permutations(range(4)), key=lambda p: float(tile[range(4), p].sum()))
        assert mask[:, column : column + 4].int().argmax(1).tolist() == list(best)


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((8, 4), FIRST), ((4, 8, 3, 1), FIRST), ((8, 4, 2, 1), Outputs(1, groups=2)), ((2, 4, 8), Outputs(2, 2, True))],
)
def test_rows_and_columns_have_as_many_in_every_layout(shape, outputs):
    mask = largest_tiles(torch.rand(shape), outputs, 2)
    assert int(mask.sum()) == mask.numel() // 2
    swapped = mask if outputs == FIRST else mask.movedim(outputs.axis, 0 if not outputs.stacked else 1)
    first = swapped if not outputs.stacked else swapped.flatten(0, 1)
    if outputs == FIRST:
        assert (first.unflatten(0, (-1, 4)).sum(1) == 2).all()
        assert (first.unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_a_tile_by_hand():
    scores = torch.tensor([[9.0, 8, 1, 1], [9, 8, 1, 1], [5, 1, 1, 1], [1, 1, 1, 5]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert torch.equal(largest_tiles(scores, FIRST, 2), expected)
