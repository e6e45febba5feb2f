"""Where the nonzeros of a matrix are: CSR with int32 indices, and the same for its transpose."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CSR", "Structure", "flat_positions", "structure"]

_INT32 = 2**31 - 1


class CSR(NamedTuple):
    """The nonzeros of a matrix, row by row.

    Attributes:
        crow: where each row begins among the nonzeros, and where the last one ends, ``(rows + 1,)``, int32.
        col: the column of each nonzero, ascending within a row, ``(nnz,)``, int32.
        shape: ``(rows, columns)``.
    """

    crow: Tensor
    col: Tensor
    shape: tuple[int, int]


class Structure(NamedTuple):
    """What products with a sparse matrix and with its transpose need.

    Attributes:
        matrix: the nonzeros row by row.
        transposed: those of the transpose.
        permutation: ``values[permutation]`` are the values in the order of ``transposed``, ``(nnz,)``, int32.
    """

    matrix: CSR
    transposed: CSR
    permutation: Tensor


def structure(positions: Tensor, shape: Sequence[int], groups: int = 1) -> Structure:
    """Return the structure of a layer's weight as the matrix that multiplies its inputs.

    With groups it is block diagonal: the outputs of a group read the inputs of that group alone.

    Args:
        positions: flat ones in the weight, ascending.
        shape: of the weight, ``(out, in / groups, *kernel)``.
        groups: of the convolution.

    >>> structure(torch.tensor([1, 2, 5]), (2, 3)).matrix
    CSR(crow=tensor([0, 2, 3], dtype=torch.int32), col=tensor([1, 2, 2], dtype=torch.int32), shape=(2, 3))
    """
    out, n = shape[0], math.prod(shape[1:])
    if max(len(positions), out, n * groups) > _INT32:
        raise ValueError(f"A sparse layer holds at most {_INT32} rows, columns and nonzeros, got {tuple(shape)}.")
    row = positions.div(n, rounding_mode="floor")
    col = positions - row * n
    if groups > 1:
        col += row.div(out // groups, rounding_mode="floor") * n
    matrix = CSR(_starts(row, out), col.int(), (out, n * groups))
    permutation = matrix.col.sort(stable=True).indices
    transposed = CSR(_starts(matrix.col, n * groups), row[permutation].int(), (n * groups, out))
    return Structure(matrix, transposed, permutation.int())


def flat_positions(crow: Tensor, col: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the flat positions in a weight of ``shape``, ascending, that ``structure`` was made from; int64."""
    rows = torch.arange(shape[0], device=crow.device).repeat_interleave(crow.diff(), output_size=len(col))
    n = math.prod(shape[1:])
    return rows * n + col % n  # of a block diagonal matrix, what the groups have shifted


def _starts(rows: Tensor, count: int) -> Tensor:
    starts = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return starts
