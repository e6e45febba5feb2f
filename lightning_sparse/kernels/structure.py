"""Where the nonzeros of a matrix are: CSR with int32 indices, and the same for its transpose."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["CSR", "Structure", "csr", "flat_positions", "structure"]

_INT16, _INT32 = 2**15 - 1, 2**31 - 1
_CHUNK = 1 << 17  # nonzeros to sort at once on the CPU: sorting takes several times the memory of the result


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
        backend: who multiplies, see ``kernels.dispatch``.
    """

    matrix: CSR
    transposed: CSR
    permutation: Tensor
    backend: str | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], backend: str | None) -> "Structure":
        """Make one of its ``tensors``."""
        crow, col, transposed_crow, transposed_col, permutation = tensors
        rows, columns = len(crow) - 1, len(transposed_crow) - 1
        matrix, transposed = CSR(crow, col, (rows, columns)), CSR(transposed_crow, transposed_col, (columns, rows))
        return cls(matrix, transposed, permutation, backend)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that take memory."""
        return self.matrix.crow, self.matrix.col, self.transposed.crow, self.transposed.col, self.permutation


def csr(positions: Tensor, shape: Sequence[int], groups: int = 1) -> CSR:
    """Return the nonzeros of a layer's weight as those of the matrix that multiplies its inputs.

    With groups it is block diagonal: the outputs of a group read the inputs of that group alone.

    Args:
        positions: flat ones in the weight, ascending; int32 or int64.
        shape: of the weight, ``(out, in / groups, *kernel)``.
        groups: of the convolution.

    >>> csr(torch.tensor([1, 2, 5]), (2, 3))
    CSR(crow=tensor([0, 2, 3], dtype=torch.int32), col=tensor([1, 2, 2], dtype=torch.int32), shape=(2, 3))
    """
    out, n = shape[0], math.prod(shape[1:])
    if max(len(positions), out, n * groups) > _INT32:
        raise ValueError(f"A sparse layer holds at most {_INT32} rows, columns and nonzeros, got {tuple(shape)}.")
    if out * n > _INT32:
        positions = positions.long()
    starts = torch.arange(out + 1, device=positions.device) * n
    crow = torch.searchsorted(positions, starts.to(positions.dtype), out_int32=True)
    col = torch.empty_like(positions, dtype=torch.int32)
    for some, part in _together(positions, col):
        part.copy_(some % n)
        if groups > 1:
            part += some.div(out // groups * n, rounding_mode="floor").mul_(n).int()
    return CSR(crow, col, (out, n * groups))


def structure(positions: Tensor, shape: Sequence[int], groups: int = 1) -> Structure:
    """Return the structure of a layer's weight as the matrix that multiplies its inputs; arguments as in ``csr``."""
    matrix = csr(positions, shape, groups)
    col, columns, n = matrix.col, matrix.shape[1], math.prod(shape[1:])
    transposed_crow = pad(torch.bincount(col, minlength=columns).cumsum(0, dtype=torch.int32), (1, 0))
    transposed_col, permutation = torch.empty_like(col), torch.empty_like(col)
    free = transposed_crow[:-1].long()  # where the next nonzero of each column goes
    first = 0
    for some, part in _together(positions, col, at_least=columns):
        keys, order = (part.short() if columns <= _INT16 else part).sort(stable=True)  # quicker by half, if short
        count = torch.bincount(part, minlength=columns)
        places = torch.arange(len(part), device=part.device).add_((free - count.cumsum(0) + count)[keys.int()])
        transposed_col.scatter_(0, places, some.index_select(0, order).div_(n, rounding_mode="floor").int())
        permutation.scatter_(0, places, order.add_(first).int())
        free += count
        first += len(part)
    return Structure(matrix, CSR(transposed_crow, transposed_col, (columns, matrix.shape[0])), permutation)


def flat_positions(crow: Tensor, col: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the flat positions in a weight of ``shape``, ascending, that ``structure`` was made from; int64."""
    n = math.prod(shape[1:])
    firsts = torch.arange(len(crow) - 1, device=crow.device).mul_(n)
    positions = firsts.repeat_interleave(crow.diff(), output_size=len(col))
    for some, part in _together(positions, col):
        some += part % n  # groups have shifted the columns of a block diagonal matrix
    return positions


def _together(a: Tensor, b: Tensor, at_least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of two vectors of one length, on the CPU small ones, but of as many elements as asked for."""
    at_once = max(_CHUNK, at_least) if a.is_cpu else max(1, len(a))
    return zip(torch.split(a, at_once), torch.split(b, at_once), strict=True)
