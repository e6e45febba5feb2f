"""Transposable N:M masks: tiles of 4 x 4 with N connections in each row and in each column.

Such a mask is N:4 in both directions, so a product with the weight and one with its transpose are both N:4 (Hubara et
al., NeurIPS 2021; Hu et al., ICML 2024). There are so few tiles (24 for N = 1, 90 for N = 2) that the best is found by
comparing all.
"""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from lightning_sparse.rules.matrices import Outputs, parts

__all__ = ["SIDE", "largest_tiles", "tiles"]

#: of a tile
SIDE = 4


@cache
def tiles(n: int) -> Tensor:
    """Return all tiles with ``n`` connections in each row and in each column: boolean, ``(number, 4, 4)``.

    >>> [len(tiles(n)) for n in (1, 2, 3)]
    [24, 90, 24]
    """
    rows = torch.zeros(0, SIDE, dtype=torch.bool)
    for chosen in combinations(range(SIDE), n):
        row = torch.zeros(1, SIDE, dtype=torch.bool)
        row[0, list(chosen)] = True
        rows = torch.cat((rows, row))
    every = rows[torch.tensor(list(product(range(len(rows)), repeat=SIDE)))]
    return every[(every.sum(1) == n).all(1)]


def largest_tiles(scores: Tensor, outputs: Outputs, n: int) -> Tensor:
    """Mark in each tile of 4 outputs by 4 inputs the connections of the largest sum, ``n`` in each row and column.

    Args:
        scores: of a weight, at least 0; inputs of a convolution are its input channels, at each place of the kernel.
        outputs: where its outputs lie.
        n: 1 to 3.
    """
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32)).nan_to_num()
    view = _tiled(exact, outputs)
    every = tiles(n).to(scores.device)
    sums = view.flatten(-2) @ every.flatten(1).to(exact.dtype).T
    marks = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    _tiled(marks, outputs).copy_(every[sums.argmax(-1)])
    return marks


def _tiled(x: Tensor, outputs: Outputs) -> Tensor:
    """Return a view with tiles in the last two dimensions."""
    view = torch.unflatten(torch.unflatten(parts(x, outputs), 1, (-1, SIDE)), 3, (-1, SIDE))
    return view.movedim((2, 4), (-2, -1))
