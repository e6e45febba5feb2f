"""What is computed with positions, ascending mostly: by torch on any device, or by compiled code where it is there."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.bits import INTEGERS
from lightning_sparse.kernels.positions_torch import Rows

__all__ = [
    "Positions",
    "exchanged",
    "located",
    "mark_",
    "marked",
    "merged",
    "moved",
    "ranks",
    "reached",
    "shifted",
    "taken",
    "transposed",
    "unheld",
    "unmarked",
]

_MANY = 1 << 15  # elements for which compiled code repays being loaded
_SEARCHED = 32  # times as long a vector is searched, not gone through


class Positions(Protocol):
    """What is computed: the functions of ``positions_torch``, where they are described."""

    def ranks(self, ascending: Tensor, x: Tensor, right: bool) -> Tensor:
        """Return how many elements of a vector are less than each of another."""

    def unheld(self, held: Tensor, places: Tensor) -> Tensor:
        """Return positions that are not held, by their places among these."""

    def merged(self, a: Tensor, b: Tensor) -> Tensor:
        """Return two vectors as one."""

    def marked(self, marks: Tensor) -> Tensor:
        """Return the positions that are marked."""

    def mark_(self, marks: Tensor, positions: Tensor) -> int:
        """Mark positions, and return how many were not marked before."""

    def moved(self, held: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is held when some are dropped and others grown, and where each comes from."""

    def exchanged(self, held: Rows, dropped: Rows, grown: Rows, columns: int) -> tuple[Tensor, Tensor]:
        """Return the same of columns, row by row."""

    def taken(self, x: Tensor, new: Tensor, source: Tensor) -> Tensor:
        """Return elements of two vectors."""

    def reached(self, x: Tensor, bound: float, largest: bool) -> Tensor:
        """Return the indices of the elements that a bound does not shut out."""

    def unmarked(self, x: Tensor, marked: Tensor, first: int, bound: float) -> tuple[Tensor, Tensor]:
        """Return where magnitudes reach a bound, and these, but for those of marked elements."""

    def located(self, u: Tensor, ends: Tensor, first: Tensor, rows: Tensor, low: Tensor, width: int) -> Tensor:
        """Return the interval that each of some numbers lies in."""

    def shifted(self, crow: Tensor, x: Tensor, shifts: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a vector with a number added to the elements of each row."""

    def transposed(self, crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nonzeros of the transpose, and where each comes from."""


def ranks(ascending: Tensor, x: Tensor, right: bool = False) -> Tensor:
    """Return how many elements of a vector are less than each of another; both are ascending, of one integer dtype.

    Args:
        ascending: a vector.
        x: another.
        right: count equal elements, too.

    >>> ranks(torch.tensor([2, 5, 7]), torch.tensor([1, 5, 9])), ranks(torch.tensor([2]), torch.tensor([2]), right=True)
    (tensor([0, 1, 3]), tensor([1]))
    """
    few = len(x) * _SEARCHED < len(ascending)
    return _code(x, few).ranks(ascending, x, right)


def unheld(held: Tensor, places: Tensor) -> Tensor:
    """Return positions that are not held, by their places among all these; both vectors are ascending, int64.

    >>> unheld(torch.tensor([0, 3]), torch.tensor([0, 1, 2]))
    tensor([1, 2, 4])
    """
    return _code(places, len(places) * _SEARCHED < len(held)).unheld(held, places)


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return two ascending vectors of one integer dtype without common elements as one, ascending.

    Args:
        a: the longer vector.
        b: the other.

    >>> merged(torch.tensor([1, 4, 6]), torch.tensor([0, 5]))
    tensor([0, 1, 4, 5, 6])
    """
    return _code(a).merged(a, b)


def marked(marks: Tensor) -> Tensor:
    """Return the positions of the True elements of a boolean vector, ascending, int64.

    >>> marked(torch.tensor([False, True, True]))
    tensor([1, 2])
    """
    return _code(marks).marked(marks)


def mark_(marks: Tensor, positions: Tensor) -> int:
    """Set a boolean vector to True at some positions, and return at how many different ones it was False.

    >>> mark_(torch.tensor([False, True, False]), torch.tensor([2, 1, 2]))
    1
    """
    return _code(positions).mark_(marks, positions)


def moved(held: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions when some are dropped and others grown, and where each comes from; all ascending, of one dtype.

    Args:
        held: the positions so far.
        dropped: some of them.
        grown: others, or some that are dropped.

    Returns:
        The new positions, and of each its index among those held and grown, one after the other, int32.

    >>> moved(torch.tensor([1, 4, 6]), torch.tensor([4]), torch.tensor([0, 5]))
    (tensor([0, 1, 5, 6]), tensor([3, 0, 4, 2], dtype=torch.int32))
    """
    return _code(held).moved(held, dropped, grown)


def exchanged(held: Rows, dropped: Rows, grown: Rows, columns: int) -> tuple[Rows, Tensor]:
    """Do as ``moved`` with columns of a matrix row by row: each vector comes after where its rows begin.

    Args:
        held: the columns so far, ascending within each row, of one dtype with the others.
        dropped: some of them.
        grown: others, or some that are dropped.
        columns: their number.

    >>> rows = [(torch.tensor(crow), torch.tensor(col)) for crow, col in (([0, 2, 3], [0, 2, 1]), ([0, 0, 1], [1]))]
    >>> exchanged(*rows, (torch.tensor([0, 1, 2]), torch.tensor([1, 0])), 3)
    ((tensor([0, 3, 4]), tensor([0, 1, 2, 0])), tensor([0, 3, 1, 4], dtype=torch.int32))
    """
    col, source = _code(held[1]).exchanged(held, dropped, grown, columns)
    return (held[0] - dropped[0] + grown[0], col), source


def taken(x: Tensor, new: Tensor, source: Tensor) -> Tensor:
    """Return the elements of two vectors, one after the other, at these indices.

    Args:
        x: a vector.
        new: another of its dtype.
        source: the indices, as ``moved`` returns them.

    >>> taken(torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([0, 2], dtype=torch.int32))
    tensor([1., 3.])
    """
    return _code(source, x.element_size() not in INTEGERS).taken(x, new, source)


def reached(x: Tensor, bound: float, largest: bool = True) -> Tensor:
    """Return the indices, ascending, of the elements of a vector that are not less than a bound; so of NaN.

    Args:
        x: the vector.
        bound: of its dtype.
        largest: False: those that are not greater.

    >>> reached(torch.tensor([1.0, 3.0, 2.0]), 2.0), reached(torch.tensor([1.0, 3.0, 2.0]), 2.0, largest=False)
    (tensor([1, 2]), tensor([0, 2]))
    """
    return _code(x).reached(x, bound, largest)


def unmarked(x: Tensor, marked: Tensor, first: int, bound: float) -> tuple[Tensor, Tensor]:
    """Return the indices, ascending, of the elements whose magnitude is not less than a bound, and their magnitudes.

    Args:
        x: the elements, a vector; it is overwritten.
        marked: positions, ascending, of elements that do not count.
        first: the position of the first element.
        bound: not negative.

    >>> unmarked(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([12]), 10, 1.0)
    (tensor([0, 1]), tensor([1., 3.]))
    """
    return _code(x).unmarked(x, marked, first, bound)


def located(u: Tensor, ends: Tensor, first: Tensor, rows: Tensor, low: Tensor, width: int) -> Tensor:
    """Return the interval that each of some numbers lies in, of intervals one after the other from 0 on; int64.

    Rows of numbers may each be limited to some intervals: of what rounding puts outside of them, to the nearest.

    Args:
        u: the numbers, from 0 to 1, float64, row by row.
        ends: where the intervals end, ascending, float64.
        first: the interval in which each of some buckets begins, of equal length up to 1; a power of 2 in number.
        rows: where each row begins among the numbers, and where the last one ends, ``(rows + 1,)``, int64.
        low: the first interval of each row, ``(rows,)``, int64.
        width: how many intervals a row has from there on.

    >>> ends, first = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64), torch.tensor([0, 1])
    >>> u, rows = torch.tensor([0.2, 0.7, 0.8], dtype=torch.float64), torch.tensor([0, 3])
    >>> located(u, ends, first, rows, torch.tensor([0]), 3)
    tensor([0, 1, 2])
    """
    return _code(u).located(u, ends, first, rows, low, width)


def shifted(crow: Tensor, x: Tensor, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a vector of elements row by row, with a number added to those of each row.

    Args:
        crow: where each row begins, and where the last one ends, ``(rows + 1,)``.
        x: the vector, of integers.
        shifts: what is added, ``(rows,)``, int64.
        dtype: of the result.

    >>> shifted(torch.tensor([0, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([0, 10]), torch.int32)
    tensor([ 1,  2, 13], dtype=torch.int32)
    """
    return _code(x).shifted(crow, x, shifts, dtype)


def transposed(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nonzeros of the transpose of a CSR matrix, row by row, and where each comes from; see ``Structure``.

    >>> transposed(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 3], [0, 1, 1])), columns=2)
    (tensor([0, 1, 3], dtype=torch.int32), tensor([0, 0, 1], dtype=torch.int32), tensor([0, 1, 2], dtype=torch.int32))
    """
    return _code(col).transposed(crow, col, columns)


def _code(x: Tensor, few: bool = False) -> Positions:
    """Return who computes with so many elements; ``few`` are torch's."""
    found = dispatch.candidates("positions", x.device, x.dtype)
    code: Positions = found["torch"] if (few or len(x) < _MANY) and "torch" in found else next(iter(found.values()))
    return code
