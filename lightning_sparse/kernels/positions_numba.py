"""Computing with ascending positions in compiled loops (extra ``fast``): what ``positions_torch`` does, on CPU."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.bits import INTEGERS
from lightning_sparse.kernels.numba_compiler import compiled
from lightning_sparse.kernels.positions_torch import Rows

if TYPE_CHECKING:
    from lightning_sparse.kernels import positions_numba as this
    from lightning_sparse.kernels.positions import Positions

    checked: Positions = this

__all__ = [
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

_PIECE = 1 << 12  # elements that the nearest cache holds
_WORD = 8  # marks of one byte in a word
_FEW = 32  # times as many elements as marks, for which it pays to look for words that are not 0


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    """Return a vector in numpy's memory, which has large pages if it is large: new small ones cost more than loops."""
    return torch.from_numpy(np.empty(n, f"i{dtype.itemsize}")).view(dtype)


def ranks(ascending: Tensor, x: Tensor, right: bool) -> Tensor:
    """As ``positions_torch.ranks``; both vectors are gone through once."""
    out = _empty(len(x), torch.int64)
    arrays = (tensor.contiguous().numpy() for tensor in (ascending, x, out))
    _ranks(int(right), *arrays)
    return out


def unheld(held: Tensor, places: Tensor) -> Tensor:
    """As ``positions_torch.unheld``, in one pass."""
    out = _empty(len(places), places.dtype)
    _unheld(*(tensor.contiguous().numpy() for tensor in (held, places, out)))
    return out


def merged(a: Tensor, b: Tensor) -> Tensor:
    """As ``positions_torch.merged``, in one pass."""
    out = _empty(len(a) + len(b), a.dtype)
    _merge(*(tensor.contiguous().numpy() for tensor in (a, b, out)))
    return out


def marked(marks: Tensor) -> Tensor:
    """As ``positions_torch.marked``, in one pass; where few are marked, eight elements at a time are left out."""
    array = marks.contiguous().numpy()
    n, words = np.count_nonzero(array), array[: len(array) // _WORD * _WORD].view(np.int64)
    found = np.empty(n + 1, np.int64)
    _list(array.view(np.uint8), words[:0] if n * _FEW > len(array) else words, found)
    return torch.from_numpy(found[:n])


def mark_(marks: Tensor, positions: Tensor) -> int:
    """As ``positions_torch.mark_``, in one pass."""
    return int(_mark(marks.numpy().view(np.uint8), positions.contiguous().numpy()))


def moved(held: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """As ``positions_torch.moved``, in one pass."""
    ours, gone, new = ((torch.tensor([0, len(x)]), x) for x in (held, dropped, grown))
    return exchanged(ours, gone, new, 1)


def exchanged(held: Rows, dropped: Rows, grown: Rows, columns: int) -> tuple[Tensor, Tensor]:
    """As ``positions_torch.exchanged``, in one pass."""
    col = _empty(len(held[1]) - len(dropped[1]) + len(grown[1]), held[1].dtype)
    source = _empty(len(col), torch.int32)
    arrays = (x.contiguous().numpy() for x in (*held, *dropped, *grown, col, source))
    _move(*arrays)
    return col, source


def taken(x: Tensor, new: Tensor, source: Tensor) -> Tensor:
    """As ``positions_torch.taken``, bit by bit, without the two as one."""
    out = _empty(len(source), x.dtype)
    bits = (t.detach().contiguous().view(INTEGERS[x.element_size()]) for t in (x, new, out))
    arrays = (t.contiguous().numpy() for t in (*bits, source))
    _take(*arrays)
    return out


def reached(x: Tensor, bound: float, largest: bool = True) -> Tensor:
    """As ``positions_torch.reached``; the vector is read twice."""
    array = x.detach().contiguous().numpy()
    return torch.from_numpy(_reach(array, array.dtype.type(bound), largest))


def unmarked(x: Tensor, marked: Tensor, first: int, bound: float) -> tuple[Tensor, Tensor]:
    """As ``positions_torch.unmarked``, in one pass, which leaves out eight elements at a time if none counts."""
    found, magnitudes = torch.empty(len(x) + 1, dtype=torch.int64), x.new_empty(len(x) + 1)
    marks = torch.zeros(_PIECE // _WORD, dtype=torch.int64)
    array, *arrays = (t.detach().numpy() for t in (x, marked, marks.view(torch.uint8), marks, found, magnitudes))
    n = _unmark(array, first, array.dtype.type(bound), *arrays)
    return found[:n].clone(), magnitudes[:n].clone()


def located(u: Tensor, ends: Tensor, first: Tensor, rows: Tensor, low: Tensor, width: int) -> Tensor:
    """As ``positions_torch.located``, in one pass."""
    out = _empty(len(u), torch.int64)
    arrays = (tensor.contiguous().numpy() for tensor in (u, ends, first, rows, low, out))
    _locate(width, *arrays)
    return out


def shifted(crow: Tensor, x: Tensor, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``positions_torch.shifted``."""
    out = _empty(len(x), dtype)
    arrays = (tensor.contiguous().numpy() for tensor in (crow, x, shifts, out))
    _shift(*arrays)
    return out


def transposed(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``positions_torch.transposed``: sorting by counting."""
    crow_of, (col_of, permutation) = crow.new_zeros(columns + 1), (_empty(len(col), col.dtype) for _ in range(2))
    found = (x.numpy() for x in (crow_of, col_of, permutation))
    _transpose(crow.contiguous().numpy(), col.contiguous().numpy(), *found)
    return crow_of, col_of, permutation


@compiled
def _ranks(more, ascending, x, out):  # type: ignore[no-untyped-def]
    i = 0
    for j in range(x.size):
        bound = x[j] + more
        while i < ascending.size and ascending[i] < bound:
            i += 1
        out[j] = i


@compiled
def _unheld(held, places, out):  # type: ignore[no-untyped-def]
    i = 0
    for k in range(places.size):
        while i < held.size and held[i] - i <= places[k]:
            i += 1
        out[k] = places[k] + i


@compiled
def _merge(a, b, out):  # type: ignore[no-untyped-def]
    i = k = 0
    for j in range(b.size):
        while i < a.size and a[i] < b[j]:
            out[k] = a[i]
            i, k = i + 1, k + 1
        out[k] = b[j]
        k += 1
    out[k:] = a[i:]


@compiled
def _list(marks, words, found):  # type: ignore[no-untyped-def]
    n = 0
    for w in range(words.size):
        if words[w]:
            for i in range(_WORD * w, _WORD * w + _WORD):
                found[n] = i
                n += marks[i]
    for i in range(_WORD * words.size, marks.size):  # additions instead of branches, which nothing can foresee
        found[n] = i
        n += marks[i]


@compiled
def _mark(marks, positions):  # type: ignore[no-untyped-def]
    new = 0
    for p in positions:
        new += 1 - marks[p]
        marks[p] = 1
    return new


@compiled
def _move(crow, held, dropped_crow, dropped, grown_crow, grown, found, source):  # type: ignore[no-untyped-def]
    k = 0
    for row in range(crow.size - 1):
        i, d, g = crow[row], dropped_crow[row], grown_crow[row]  # the next of each
        held_end, dropped_end, grown_end = crow[row + 1], dropped_crow[row + 1], grown_crow[row + 1]
        while i < held_end or g < grown_end:
            while i < held_end and (g == grown_end or held[i] < grown[g]):
                goes = d < dropped_end and held[i] == dropped[d]
                if k < found.size:  # what is written of one that goes, the next overwrites
                    found[k], source[k] = held[i], i
                i, d, k = i + 1, d + goes, k + (not goes)
            if g < grown_end:
                found[k], source[k] = grown[g], held.size + g
                g, k = g + 1, k + 1


@compiled
def _take(x, new, out, source):  # type: ignore[no-untyped-def]
    n = np.uint32(x.size)
    for k in range(out.size):
        p = np.uint32(source[k])  # numba looks whether other indices are negative
        out[k] = x[p] if p < n else new[p - n]


@compiled
def _reach(x, bound, largest):  # type: ignore[no-untyped-def]
    n = 0
    for i in range(x.size):
        n += not (x[i] < bound if largest else x[i] > bound)
    found = np.empty(n + 1, np.int64)
    n = 0
    for i in range(x.size):
        found[n] = i
        n += not (x[i] < bound if largest else x[i] > bound)
    return found[:n]


@compiled
def _unmark(x, first, bound, marked, marks, words, found, magnitudes):  # type: ignore[no-untyped-def]
    n = p = 0
    filled = np.empty(words.size + 1, np.int64)  # the words that are not 0
    for low in range(0, x.size, marks.size):
        piece = x[low : low + marks.size]
        for i in range(piece.size):
            marks[i] = not abs(piece[i]) < bound
        marks[piece.size :] = 0
        while p < marked.size and marked[p] - first < low + piece.size:
            marks[marked[p] - first - low] = 0
            p += 1
        count = 0
        for k in range(words.size):  # additions instead of branches, which nothing can foresee
            filled[count] = k
            count += words[k] != 0
        whole = piece.size // _WORD
        for q in range(count):
            start = _WORD * filled[q]
            if filled[q] < whole:  # a loop of known length
                for i in range(start, start + _WORD):
                    found[n], magnitudes[n] = low + i, abs(piece[i])
                    n += marks[i]
            else:
                for i in range(start, piece.size):
                    found[n], magnitudes[n] = low + i, abs(piece[i])
                    n += marks[i]
    return n


@compiled
def _locate(width, u, ends, first, rows, low, out):  # type: ignore[no-untyped-def]
    for i in range(low.size):
        high = low[i] + width - 1
        for k in range(rows[i], rows[i + 1]):
            found = min(max(np.int64(first[min(np.int64(u[k] * first.size), first.size - 1)]), low[i]), high)
            if ends[found] <= u[k]:  # seldom: a bucket that several intervals share, of which there may be many
                found += np.searchsorted(ends[found:high], u[k], side="right")
            out[k] = found


@compiled
def _shift(crow, x, shifts, out):  # type: ignore[no-untyped-def]
    for i in range(shifts.size):
        for p in range(crow[i], crow[i + 1]):
            out[p] = x[p] + shifts[i]


@compiled
def _transpose(crow, col, crow_of, col_of, permutation):  # type: ignore[no-untyped-def]
    for p in range(col.size):
        crow_of[np.uint32(col[p]) + 1] += 1  # numba looks whether other indices are negative
    for j in range(1, crow_of.size):
        crow_of[j] += crow_of[j - 1]
    free = crow_of[:-1].copy()  # where the next nonzero of each column goes
    for i in range(crow.size - 1):
        for p in range(crow[i], crow[i + 1]):
            column = np.uint32(col[p])
            place = np.uint32(free[column])
            free[column] += 1
            col_of[place], permutation[place] = i, p
