"""Level: the number that exactly so many margins of several layers exceed, each layer having some in any case.

A margin says how far a weight is above its threshold. From one step to the next the level moves little, so only the
margins near 0 are looked at, and more of them where these turn out to be too few. The result is exact.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cut", "Near", "cuts", "evenly"]

#: widths above are taken to be infinite
_WIDEST = 1e9


class Near(NamedTuple):
    """What is known of the margins of a layer.

    Attributes:
        above: how many are above the width that was looked at.
        values: those within it, ``(n,)``, in float64 on the CPU; all that are not above, if the width is infinite.
    """

    above: int
    values: Tensor

    def count(self, level: float) -> int:
        """Return how many exceed a ``level`` within the width."""
        return self.above + int((self.values > level).count_nonzero())


class Cut(NamedTuple):
    """Between which margins the level lies.

    Attributes:
        below: the largest margin that is less than ``kth``; -inf: there is none.
        kth: the k-th largest margin, or the least if there are fewer; inf: it was too large to be looked at.
        k: how many margins of all layers with this cut are to be above.
    """

    below: float
    kth: float
    k: int

    @property
    def level(self) -> float:
        """A number from ``below`` on and less than ``kth``: 0 if it is one, else midway.

        >>> Cut(-0.5, 0.25, 9).level, Cut(0.5, 1.0, 9).level, Cut(-math.inf, -1.0, 9).level
        (0.0, 0.75, -3.0)
        """
        if self.below <= 0 < self.kth:
            return 0.0
        if math.isinf(self.kth):
            return 2 * self.below + 1
        return 2 * self.kth - 1 if math.isinf(self.below) else (self.below + self.kth) / 2


def cuts(
    near: Callable[[float], Sequence[Near]], k: int, at_least: Sequence[int], width: float
) -> tuple[list[Cut], float]:
    """Return where to cut each layer so that ``k`` margins of all are above, and ``at_least`` so many of each.

    It is the same cut for all layers, but for those that would fall below what they have at least. Among equal margins
    at the cut all are above.

    Args:
        near: returns what is known of the margins of each layer, looking no further from 0 than its argument.
        k: at least the sum of ``at_least``, at least 1.
        at_least: for each layer.
        width: how far to look first, above 0.

    Returns:
        The cuts, and how far to look next time.

    >>> margins = [torch.tensor([0.3, 0.1, -0.2]).double(), torch.tensor([0.5, 0.4]).double()]
    >>> found, _ = cuts(lambda width: [Near(0, each) for each in margins], 3, [0, 0], math.inf)
    >>> [round(cut.level, 3) for cut in found]
    [0.2, 0.2]
    """
    while True:
        known = near(width)
        found = _cuts(known, k, at_least, whole=math.isinf(width))
        if found is not None:
            return found, _next(width, known, found)
        width = 4 * width if width < _WIDEST else math.inf


def _next(width: float, known: Sequence[Near], found: Sequence[Cut]) -> float:
    """Return how far to look next time: less far where far more was found than was needed."""
    within, width = sum(len(each.values) for each in known), min(width, _WIDEST)
    return width / 2 if within > 2048 and width > 16 * max(abs(cut.level) for cut in found) else width


def _cuts(known: Sequence[Near], k: int, at_least: Sequence[int], whole: bool) -> list[Cut] | None:
    """Return the cuts, None if too little is known."""
    found: dict[int, Cut | None] = {}
    shared = list(range(len(known)))
    while shared:
        cut = _cut([known[i] for i in shared], k, whole)
        if cut is None:
            return None
        short = [i for i in shared if at_least[i] and known[i].count(cut.level) < at_least[i]]
        if not short:
            found |= dict.fromkeys(shared, cut)
            break
        found |= {i: _cut([known[i]], at_least[i], whole) for i in short}
        k -= sum(at_least[i] for i in short)
        shared = [i for i in shared if i not in short]
    ordered = [found[i] for i in range(len(known))]
    return [cut for cut in ordered if cut is not None] if None not in ordered else None


def _cut(known: Sequence[Near], k: int, whole: bool) -> Cut | None:
    """Return the cut below the ``k``-th largest margin of some layers, None if too little is known."""
    rank = k - sum(each.above for each in known)
    values = np.concatenate([each.values.numpy() for each in known])
    if not whole and not 1 <= rank < len(values):
        return None
    kth = math.inf
    if rank >= 1 and len(values):
        place = max(0, len(values) - rank)
        kth = float(np.partition(values, place)[place])
    lower = values[values < kth]
    if not whole and not len(lower):
        return None
    return Cut(float(lower.max()) if len(lower) else -math.inf, kth, k)


def evenly(n: int, k: int) -> Tensor:
    """Return ``k`` of the numbers below ``n``, ascending: spread evenly, over any rows that they are laid out in.

    Those whose multiple of the golden ratio has the smallest fraction.

    >>> evenly(12, 4)
    tensor([ 0,  2,  5, 10])
    """
    fractions = (torch.arange(n, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)).frac()
    return fractions.argsort()[:k].sort().values
