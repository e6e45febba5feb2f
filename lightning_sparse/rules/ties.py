"""Ties: which of equal scores win.

A layer that begins at zero (LoRA's B, ControlNet, the heads of DiT) scores all its connections alike, and so does one
whose gradients are all 0. The earlier positions, which a sort would take, are those of the first outputs: the others
would get no connection. Decision: equals are told apart by where they stand in their weight, in an order whose every
beginning has the same number of places in each row and in each column, give or take one. A random order would be even
on average only, and would have to be drawn and saved. This one is the same on all processes, with both stores and in a
resumed run, and is not computed where no equals are left over.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["Order", "after", "at", "spread"]

#: gives each element of a vector of scores, by its index, a number: of equal scores those of least number win
Order = Callable[[Tensor], Tensor]

_GOLDEN = (5**0.5 - 1) / 2


def spread(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the place of flat positions in an order that goes evenly over rows and columns.

    Place n lies in row ``n mod rows`` and column ``step n mod columns``, where ``step`` is near the golden section of
    the columns; whenever n has been through all pairs that this gives, the columns move on by one.

    Args:
        positions: in a weight of this ``shape``.
        shape: ``(out, in, ...)``; all but the first dimension make up the columns. A vector is one row.

    Returns:
        Whole numbers from 0 to the weight's size - 1, each of which belongs to one position.

    >>> import torch
    >>> spread(torch.arange(12), (3, 4)).view(3, 4)
    tensor([[ 0,  3,  6,  9],
            [ 4,  7, 10,  1],
            [ 8, 11,  2,  5]])
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    common = math.gcd(rows, columns)
    cycle = columns // common
    step = _coprime(round(_GOLDEN * columns), columns)
    row, column = positions.div(columns, rounding_mode="floor"), positions % columns
    # column = step (rows turn + row + moves), where the columns have moved on once for every `cycle` turns
    left = (column * pow(step, -1, columns) - row) % columns
    moves = left % common
    turn = (left - moves).div_(common, rounding_mode="floor").mul_(pow(rows // common, -1, cycle)) % cycle
    return turn.add_(moves, alpha=cycle).mul_(rows).add_(row)


def at(positions: Tensor, shape: Sequence[int]) -> Order:
    """Return the order of scores that belong to these flat positions of a weight of this ``shape``."""
    return lambda indices: spread(positions[indices.to(positions.device)].to(indices.device), shape)


def after(first: int, shape: Sequence[int]) -> Order:
    """Return the order of scores that belong to the positions of such a weight from ``first`` on."""
    return lambda indices: spread(indices + first, shape)


def _coprime(near: int, n: int) -> int:
    """Return a whole number from ``near`` on that has no factor in common with ``n``."""
    return next(step for step in range(max(near, 1), near + n + 1) if math.gcd(step, n) == 1)
