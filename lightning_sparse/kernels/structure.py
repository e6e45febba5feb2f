"""Where the nonzeros of a matrix are: CSR with int32 indices, and the same for its transpose.

Products read and write where indices point to, and check nothing: indices that a program has not made itself go
through ``check_positions`` or ``check_csr`` first.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse.kernels.positions import exchanged, shifted, transposed

__all__ = ["CSR", "Structure", "check_csr", "check_positions", "csr", "flat_positions", "moved", "structure"]

_INT32 = 2**31 - 1
_INDICES = torch.int32, torch.int64
_OTHER_FILE = "The file is broken, or of another network: give the one that belongs to this."
_CHUNK = 1 << 17  # positions at once on the CPU, beside which their temporaries are small


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
        block: size of the nonzeros, if these are blocks; the rest then is of the matrix of blocks.
    """

    matrix: CSR
    transposed: CSR
    permutation: Tensor
    backend: str | None = None
    block: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], backend: str | None, block: tuple[int, int] = (1, 1)) -> "Structure":
        """Make one of its ``tensors``."""
        crow, col, transposed_crow, transposed_col, permutation = tensors
        rows, columns = len(crow) - 1, len(transposed_crow) - 1
        matrix, transposed = CSR(crow, col, (rows, columns)), CSR(transposed_crow, transposed_col, (columns, rows))
        return cls(matrix, transposed, permutation, backend, block)

    @property
    def row_lengths(self) -> Tensor:
        """Number of nonzeros in each row of the weight, ``(out,)``."""
        rows, columns = self.block
        lengths = self.matrix.crow.diff()
        return lengths if rows == columns == 1 else lengths.mul_(columns).repeat_interleave(rows)

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
    group = torch.arange(out, device=positions.device).div_(out // groups, rounding_mode="floor")
    return CSR(crow, shifted(crow, positions, group.mul_(n).sub_(starts[:-1]), torch.int32), (out, n * groups))


def structure(positions: Tensor, shape: Sequence[int], groups: int = 1) -> Structure:
    """Return the structure of a layer's weight as the matrix that multiplies its inputs; arguments as in ``csr``."""
    return _with_transpose(csr(positions, shape, groups))


def moved(matrix: CSR, dropped: CSR, grown: CSR) -> tuple[Structure, Tensor]:
    """Return the structure of a matrix when some nonzeros are dropped and others grown, and where each comes from.

    Args:
        matrix: the nonzeros so far.
        dropped: some of them.
        grown: others, or some that are dropped; as ``dropped``, they may be on another device than ``matrix``.

    Returns:
        The structure, and of each nonzero its index among those of ``matrix`` and of ``grown`` behind them, int32.
    """
    device, columns = matrix.col.device, matrix.shape[1]
    ours, gone, new = ((each.crow.cpu(), each.col.cpu()) for each in (matrix, dropped, grown))
    (crow, col), source = exchanged(ours, gone, new, columns)
    return _with_transpose(CSR(crow.to(device), col.to(device), matrix.shape)), source.to(device)


def _with_transpose(matrix: CSR) -> Structure:
    rows, columns = matrix.shape
    crow, col, permutation = transposed(matrix.crow, matrix.col, columns)
    return Structure(matrix, CSR(crow, col, (columns, rows)), permutation)


def flat_positions(crow: Tensor, col: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the flat positions in a weight of ``shape``, ascending, that ``structure`` was made from; int64."""
    n = math.prod(shape[1:])
    starts = torch.arange(len(crow) - 1, device=crow.device).mul_(n)
    if len(col) and int(col.max()) >= n:  # groups have shifted the columns of a block diagonal matrix
        held = col.index_select(0, crow[:-1].clamp(max=len(col) - 1))
        starts -= held.div(n, rounding_mode="floor").mul_(n)
    return shifted(crow, col, starts, torch.int64)


def check_positions(positions: Tensor, shape: Sequence[int], name: str = "positions") -> None:
    """Raise unless these are flat positions in a weight of this shape, ascending and different.

    >>> check_positions(torch.tensor([0, 6]), (2, 3))
    Traceback (most recent call last):
    ValueError: positions must be from 0 to 5 in a weight of shape (2, 3), got 0 to 6. Give mask.flatten().nonzero().
    """
    remedy = "Give mask.flatten().nonzero()."
    _check_vector(positions, _INDICES, remedy, name)
    if not len(positions):
        return
    if not all(bool((left < right).all()) for left, right in _together(positions[:-1], positions[1:])):
        raise ValueError(f"{name} must be ascending and different, got {_few(positions)}. {remedy}")
    first, last, size = int(positions[0]), int(positions[-1]), math.prod(shape)
    if first < 0 or last >= size:
        raise ValueError(
            f"{name} must be from 0 to {size - 1} in a weight of shape {tuple(shape)}, got {first} to {last}. {remedy}"
        )


def check_csr(entries: Mapping[str, Tensor], shape: Sequence[int], groups: int | None = 1) -> None:
    """Raise unless three vectors are a weight's nonzeros as ``csr`` makes them; nothing is computed with them before.

    Args:
        entries: by their names, in this order: where each row begins, the columns, the values.
        shape: of the weight.
        groups: of a convolution; None: any number that the columns fit.

    Raises:
        ValueError: they are no vectors of one weight, or point out of it.
    """
    (rows, crow), (columns, col), (held, values) = entries.items()
    for name in rows, columns:
        _check_vector(entries[name], _INDICES, _OTHER_FILE, name)
    _check_vector(values, (), _OTHER_FILE, held)
    crow, out, n = crow.to(col.device), shape[0], math.prod(shape[1:])
    if max(out, n) > _INT32:
        raise ValueError(
            f"A sparse weight must have at most {_INT32} rows and columns, got {tuple(shape)}. {_OTHER_FILE}"
        )
    if len(crow) != out + 1:
        raise ValueError(f"{rows} must have {out + 1} elements, one more than rows, got {len(crow)}. {_OTHER_FILE}")
    if len(col) != len(values):
        raise ValueError(
            f"{columns} must have an element for each of {len(values)} values, got {len(col)}. {_OTHER_FILE}"
        )
    if crow[0] != 0 or crow[-1] != len(col) or (crow[1:] < crow[:-1]).any():
        raise ValueError(f"{rows} must ascend from 0 to the {len(col)} nonzeros, got {_few(crow)}. {_OTHER_FILE}")
    if not len(col):
        return
    ascends = col[1:] > col[:-1]
    begins = crow[1:-1].long()
    ascends[begins[(begins > 0) & (begins < len(col))] - 1] = True
    if not ascends.all():
        raise ValueError(f"{columns} must ascend within each row, each different, got {_few(col)}. {_OTHER_FILE}")
    filled = (crow[1:] > crow[:-1]).nonzero().flatten()
    first, last = col[crow[filled].long()].long(), col[crow[filled + 1].long() - 1].long()
    most = out if len(shape) > 2 else 1
    possible = (g for g in range(1, most + 1) if out % g == 0) if groups is None else (groups,)
    lows = (filled.div(out // g, rounding_mode="floor") * n for g in possible)
    if not any(bool(((low <= first) & (last < low + n)).all()) for low in lows):
        raise ValueError(
            f"{columns} must be columns of a weight of shape {tuple(shape)}, from 0 to {n - 1} in each group, got "
            f"{int(first.min())} to {int(last.max())}. {_OTHER_FILE}"
        )


def _check_vector(x: Tensor, dtypes: Sequence[torch.dtype], remedy: str, name: str) -> None:
    """Raise unless ``x`` is a vector of these dtypes; of none: of floating-point or complex numbers."""
    if not isinstance(x, Tensor):
        got = f"one of type {type(x).__name__}"
    elif x.ndim != 1 or x.is_meta or x.layout != torch.strided:
        got = f"a tensor of shape {tuple(x.shape)}, {x.layout}, on the device {x.device}"
    elif not (x.dtype in dtypes if dtypes else x.is_floating_point() or x.is_complex()):
        got = f"one of {x.dtype}"
    else:
        return
    kinds = " or ".join(map(str, dtypes)) or "a floating-point dtype"
    raise ValueError(f"{name} must be a vector of {kinds}, got {got}. {remedy}")


def _few(x: Tensor) -> str:
    return f"[{', '.join(map(str, x[:6].tolist()))}{', ...' if len(x) > 6 else ''}]"


def _together(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of two vectors of one length, on the CPU small ones."""
    at_once = _CHUNK if a.is_cpu else max(1, len(a))
    return zip(torch.split(a, at_once), torch.split(b, at_once), strict=True)
