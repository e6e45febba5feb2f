"""Computing with ascending positions in torch, on any device."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

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

#: where each row begins in a vector, ``(rows + 1,)``, and the vector
Rows = tuple[Tensor, Tensor]

_INT16, _INT32 = 2**15 - 1, 2**31 - 1
_CHUNK = 1 << 17  # nonzeros at once on the CPU: temporaries take several times the memory of the result


def ranks(ascending: Tensor, x: Tensor, right: bool) -> Tensor:
    """Return how many elements of ``ascending`` are less than each of ``x``, or with ``right`` not greater; int64."""
    return torch.searchsorted(ascending, x, right=right)


def unheld(held: Tensor, places: Tensor) -> Tensor:
    """As ``positions.unheld``."""
    free_before = torch.arange(len(held)).neg_().add_(held)
    return ranks(free_before, places, True).add_(places)


def merged(a: Tensor, b: Tensor) -> Tensor:
    """As ``positions.merged``."""
    of_b = ranks(a, b, False).add_(torch.arange(len(b), device=a.device))
    others = torch.ones(len(a) + len(b), dtype=torch.bool, device=a.device).index_fill_(0, of_b, False)
    return a.new_empty(len(others)).masked_scatter_(others, a).index_copy_(0, of_b, b)


def marked(marks: Tensor) -> Tensor:
    """As ``positions.marked``."""
    if not marks.is_cpu:
        return marks.nonzero().squeeze(1)
    return torch.from_numpy(marks.numpy().nonzero()[0])  # on one thread up to nine times as fast as torch's


def mark_(marks: Tensor, positions: Tensor) -> int:
    """As ``positions.mark_``; what lies between the first and the last position is counted before and after."""
    if not len(positions):
        return 0
    low, high = positions.aminmax()
    between = marks[int(low) : int(high) + 1]
    before = torch.count_nonzero(between)
    marks.index_fill_(0, positions, True)
    return int(torch.count_nonzero(between) - before)


def moved(held: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions when some are dropped and others grown, and the index of each among held and grown."""
    staying = torch.ones_like(held, dtype=torch.bool).index_fill_(0, ranks(held, dropped, False), False)
    before = ranks(held, grown, False).sub_(ranks(dropped, grown, False))  # of those that stay
    of_grown = before.add_(torch.arange(len(grown), device=held.device))
    source = torch.empty(len(held) - len(dropped) + len(grown), dtype=torch.int32, device=held.device)
    others = torch.ones_like(source, dtype=torch.bool).index_fill_(0, of_grown, False)
    source.masked_scatter_(others, staying.nonzero().squeeze(1).int())
    both = torch.arange(len(held), len(held) + len(grown), dtype=torch.int32, device=held.device)
    source.index_copy_(0, of_grown, both)
    return torch.cat((held, grown)).index_select(0, source), source


def exchanged(held: Rows, dropped: Rows, grown: Rows, columns: int) -> tuple[Tensor, Tensor]:
    """Return the columns of ``positions.exchanged``, and the index of each among those held and grown."""
    rows = len(held[0]) - 1
    starts = torch.arange(rows, device=held[1].device).mul_(columns)
    dtype = torch.int32 if rows * columns <= _INT32 else torch.int64
    _, source = moved(*(shifted(crow, col, starts, dtype) for crow, col in (held, dropped, grown)))
    return torch.cat((held[1], grown[1])).index_select(0, source), source


def taken(x: Tensor, new: Tensor, source: Tensor) -> Tensor:
    """Return the elements of two vectors, one after the other, at these indices."""
    return torch.cat((x, new)).index_select(0, source)


def reached(x: Tensor, bound: float, largest: bool) -> Tensor:
    """Return the indices, ascending, int64, of the elements that are not less than ``bound``, or not greater."""
    return marked((torch.lt(x, bound) if largest else torch.gt(x, bound)).logical_not_())


def unmarked(x: Tensor, marked: Tensor, first: int, bound: float) -> tuple[Tensor, Tensor]:
    """As ``positions.unmarked``."""
    found = reached(x.abs_().index_fill_(0, marked - first, -1), bound, True)
    return found, x.index_select(0, found)


def located(u: Tensor, ends: Tensor, first: Tensor, rows: Tensor, low: Tensor, width: int) -> Tensor:
    """As ``positions.located``."""
    found = first.index_select(0, u.mul(len(first)).long().clamp_(max=len(first) - 1)).long().clamp_(max=len(ends) - 1)
    later = marked(ends.index_select(0, found) <= u)
    found.index_copy_(0, later, torch.searchsorted(ends, u[later], right=True))
    of_numbers = low.repeat_interleave(rows.diff(), output_size=len(u))
    return torch.minimum(torch.maximum(found, of_numbers), of_numbers.add(width - 1))


def shifted(crow: Tensor, x: Tensor, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x``, of rows that begin at ``crow``, with the row's one of ``shifts`` added to each element."""
    out = torch.empty(len(x), dtype=dtype, device=x.device)
    for part, lengths in _parts(crow, x):
        out[part] = shifts.repeat_interleave(lengths, output_size=int(lengths.sum())).add_(x[part])
    return out


def transposed(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows' beginnings and columns of the transpose, and where its nonzeros are in the matrix; int32.

    Args:
        crow: where each row of the matrix begins, ``(rows + 1,)``.
        col: its columns, ``(nnz,)``.
        columns: their number.
    """
    transposed_crow = pad(torch.bincount(col, minlength=columns).cumsum(0, dtype=torch.int32), (1, 0))
    transposed_col, permutation = torch.empty_like(col), torch.empty_like(col)
    free = transposed_crow[:-1].long()  # where the next nonzero of each column goes
    rows = torch.arange(len(crow) - 1, dtype=torch.int32, device=col.device)
    for some, lengths in _parts(crow, col, columns):
        part = col[some]
        keys, order = (part.short() if columns <= _INT16 else part).sort(stable=True)  # quicker by half, if short
        count = torch.bincount(part, minlength=columns)
        places = torch.arange(len(part), device=part.device).add_((free - count.cumsum(0) + count)[keys.int()])
        row = rows.repeat_interleave(lengths, output_size=len(part))
        transposed_col.scatter_(0, places, row.index_select(0, order))
        permutation.scatter_(0, places, order.add_(some.start).int())
        free += count
    return transposed_crow, transposed_col, permutation


def _parts(crow: Tensor, x: Tensor, at_least: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of the nonzeros, on the CPU small ones, and how many of each row are in it."""
    at_once = max(_CHUNK, len(crow), at_least) if x.is_cpu else max(1, len(x))
    for first in range(0, len(x), at_once):
        last = min(first + at_once, len(x))
        yield slice(first, last), crow.clamp(first, last).diff()
