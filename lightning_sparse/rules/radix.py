"""Radix: exactly the k least of numbers that are divided over processes, without sending any of them.

Numbers are compared by their bits, eight at a time from the highest on. Each process counts how many of its own have
each of the 256 values; the counts are added up over the processes, and tell which value the k-th number has. After four
such rounds for float32, or eight for float64, it is known. So what is sent does not depend on how many numbers there
are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse.kernels.bits import INTEGERS
from lightning_sparse.rules import select
from lightning_sparse.rules.ties import Order

__all__ = ["Add", "Bound", "kth", "least", "ordered"]

_BITS = 8
_VALUES = 1 << _BITS

#: returns the sum over all processes of a tensor that each of them has
Add = Callable[[Tensor], Tensor]


class Bound(NamedTuple):
    """Where the least numbers end.

    Attributes:
        last: all numbers up to this one are among them.
        tied: of this one there are more than are wanted; None: there is no such number.
        missing: how many of those are wanted.
    """

    last: int
    tied: int | None = None
    missing: int = 0


def ordered(scores: Tensor) -> Tensor:
    """Return whole numbers in the order of scores; NaN counts as infinitely large.

    >>> ordered(torch.tensor([0.0, -1.0, 2.0, float("nan")])).argsort()
    tensor([1, 0, 2, 3])
    """
    if not scores.is_floating_point():
        return scores
    x = scores.float() if scores.element_size() < 4 else scores
    x = x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0  # one 0 for both
    bits = x.view(INTEGERS[x.element_size()])
    negative = bits >> (8 * x.element_size() - 1)  # all ones, or all zeros
    return bits ^ (negative & torch.iinfo(bits.dtype).max)  # as integers negative numbers run the other way


def kth(keys: Sequence[Tensor], k: Sequence[int], add: Add) -> list[Bound]:
    """Return where the ``k`` least of several lists of whole numbers end; all lists are counted in one round.

    Args:
        keys: what this process has of each list, all of one signed dtype.
        k: for each list, at least 1.
        add: see ``Add``.

    Raises:
        ValueError: a list is shorter than its ``k``.
    """
    left, prefix, bounds = [*k], [0] * len(k), dict[int, Bound]()
    keys, top = [*keys], 8 * keys[0].element_size() - _BITS
    for shift in range(top, -1, -_BITS):
        open_ = [i for i in range(len(k)) if i not in bounds]
        digits = {i: (keys[i] >> shift) + _VALUES // 2 if shift == top else (keys[i] >> shift) & 255 for i in open_}
        counts = add(torch.stack([torch.bincount(digits[i], minlength=_VALUES) for i in open_]))
        for i, count in zip(open_, counts, strict=True):
            upto = count.cumsum(0)
            if left[i] > upto[-1]:
                raise ValueError(f"{k[i]} of {int(upto[-1])} candidates were asked for.")
            digit = int(torch.searchsorted(upto, left[i]))
            within = int(count[digit])
            left[i] -= int(upto[digit]) - within
            prefix[i] = digit - _VALUES // 2 if shift == top else (prefix[i] << _BITS) | digit
            if within == left[i]:
                bounds[i] = Bound(((prefix[i] + 1) << shift) - 1)
            elif not shift:
                bounds[i] = Bound(prefix[i] - 1, prefix[i], left[i])
            else:
                keys[i] = keys[i][digits[i] == digit]
        if len(bounds) == len(k):
            break
    return [bounds[i] for i in range(len(k))]


def least(
    keys: Sequence[Tensor],
    k: Sequence[int],
    orders: Sequence[Sequence[Order]],
    add: Add,
    counted: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Mark exactly the ``k`` least of each of several lists of numbers that are divided over processes.

    Args:
        keys: what this process has of each list, all of one signed dtype.
        k: for each list, from 0 to its length.
        orders: for each list, what tells equals apart: the first order, among those that it leaves equal the next.
        add: see ``Add``.
        counted: marks in each list the numbers that count here, and not on another process that has them, too; default:
            all.

    >>> least([torch.tensor([3, 1, 2, 1])], [1], [[lambda indices: -indices]], lambda counts: counts)
    [tensor([False, False, False,  True])]
    """
    marks = [torch.zeros(len(key), dtype=torch.bool, device=key.device) for key in keys]
    live = [i for i, n in enumerate(k) if n > 0]
    if not live:
        return marks
    own = keys if counted is None else [key[here] for key, here in zip(keys, counted, strict=True)]
    tied: dict[int, tuple[Tensor, int]] = {}
    for i, bound in zip(live, kth([own[i] for i in live], [k[i] for i in live], add), strict=True):
        if bound.tied is None:
            marks[i] = keys[i] <= bound.last
        else:
            marks[i] = keys[i] < bound.tied
            tied[i] = select.positions(keys[i] == bound.tied), bound.missing
    if tied:
        ranks = [ordered(orders[i][0](places)) for i, (places, _) in tied.items()]
        here = None if counted is None else [counted[i][places] for i, (places, _) in tied.items()]
        chosen = least(ranks, [n for _, n in tied.values()], [orders[i][1:] for i in tied], add, here)
        for (i, (places, _)), won in zip(tied.items(), chosen, strict=True):
            marks[i][places[won]] = True
    return marks
