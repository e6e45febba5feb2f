"""Where the nonzeros of a matrix are: CSR with int32 indices, and the same for its transpose."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["CSR", "Structure", "flat_positions", "structure"]

_INT16, _INT32 = 2**15 - 1, 2**31 - 1


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
        backend: the module that multiplies, see ``storage.backends``.
    """

    matrix: CSR
    transposed: CSR
    permutation: Tensor
    backend: str | None = None


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
    device, columns = positions.device, n * groups
    crow = torch.searchsorted(positions, torch.arange(out + 1, device=device) * n, out_int32=True)
    col = (positions % n).int()
    if groups > 1:
        col += _rows(crow, len(col)).div(out // groups, rounding_mode="floor") * n
    transposed_crow = pad(torch.bincount(col, minlength=columns).cumsum(0, dtype=torch.int32), (1, 0))
    keys = col.short() if columns <= _INT16 else col  # sorted in half of the time
    permutation = keys.sort(stable=True).indices.int()
    transposed_col = _rows(crow, len(col)).index_select(0, permutation)
    return Structure(CSR(crow, col, (out, columns)), CSR(transposed_crow, transposed_col, (columns, out)), permutation)


def flat_positions(crow: Tensor, col: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the flat positions in a weight of ``shape``, ascending, that ``structure`` was made from; int64."""
    n = math.prod(shape[1:])
    return _rows(crow, len(col)).long() * n + col % n  # of a block diagonal matrix, what the groups have shifted


def _rows(crow: Tensor, nnz: int) -> Tensor:
    """Return the row of each nonzero; int32, as sorting and indexing take several times the memory of an index."""
    rows = torch.arange(len(crow) - 1, dtype=torch.int32, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=nnz)
