"""Level: the number that exactly so many margins of several layers exceed, each layer having some in any case.

A margin says how far a weight is above its threshold. From one step to the next the level is much the same, so
only the margins about as large are looked at, and more of them where these turn out to be too few. The result is exact.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lightning_sparse.rules.parts import WHOLE, Together
from lightning_sparse.rules.radix import kth, ordered

__all__ = ["Cut", "Look", "Near", "cuts"]

#: widths above are taken to be infinite
_WIDEST = 1e9


class Look(NamedTuple):
    """Which margins are looked at: those from ``centre - width`` up to ``centre + width``."""

    centre: float = 0.0
    width: float = 1e-3

    @property
    def bounds(self) -> tuple[float, float]:
        """From where, which is excluded, to where, which is included."""
        return self.centre - self.width, self.centre + self.width

    @property
    def wider(self) -> "Look":
        """Four times as wide, in the end infinitely."""
        return Look(self.centre, 4 * self.width if self.width < _WIDEST else math.inf)

    def next(self, found: Sequence["Cut"]) -> "Look":
        """Return where to look next time: about the levels that were found.

        The width goes a quarter of the way, in logarithms, to five times the distance from where these were expected,
        or to where there are some margins at all. It starts from the first look of this time, not from what a jump has
        widened it to: a look that is too narrow costs another one, one that is too wide may have all margins to sort.
        """
        levels, width = [cut.level for cut in found], min(self.width, _WIDEST)
        low, high = min(levels), max(levels)
        gap = min(cut.kth - cut.below for cut in found)
        distance = max(abs(self.centre - low), abs(self.centre - high), min(gap, width / 5), width / 1e6)
        return Look((low + high) / 2, width**0.75 * (5 * distance) ** 0.25)


class Near(NamedTuple):
    """What is known of the margins of several layers.

    Attributes:
        above: how many of each layer are above those that were looked at.
        counts: how many of each layer were looked at, of what is here.
        values: these, layer by layer, in float64; all that are not above, if the width is infinite.
        part: what is here of the layers.
    """

    above: Sequence[int]
    counts: Sequence[int]
    values: np.ndarray
    part: Together = WHOLE

    def count(self, level: float) -> int:
        """Return how many exceed a ``level`` that was looked at."""
        return sum(self.above) + self.part.total(int(np.count_nonzero(self.values > level)))[0]

    def layer(self, i: int) -> "Near":
        """Return what is known of one layer."""
        start = sum(self.counts[:i])
        return Near([self.above[i]], [self.counts[i]], self.values[start : start + self.counts[i]], self.part)

    def layers(self, chosen: Sequence[int]) -> "Near":
        """Return what is known of some layers, ascending."""
        if len(chosen) == len(self.above):
            return self
        parts = [self.layer(i) for i in chosen]
        values = np.concatenate([part.values for part in parts])
        return Near([part.above[0] for part in parts], [part.counts[0] for part in parts], values, self.part)

    def ends(self, rank: int) -> tuple[int, float, float]:
        """Return how many were looked at, the one of this rank from the largest, 1, on, and the largest less than it.

        It is the least if there are fewer, and infinite if there is none or ``rank`` is less. None is less than -inf.
        """
        if self.part is not WHOLE:
            return self._ends_of_all(rank)
        nth, less = math.inf, self.values
        if rank >= 1 and len(less):
            place = max(0, len(less) - rank)
            values = np.partition(less, place)
            nth, less = float(values[place]), values[:place]
        return len(self.values), nth, float(np.fmax.reduce(less[~(less >= nth)], initial=-math.inf))

    def _ends_of_all(self, rank: int) -> tuple[int, float, float]:
        """Do the same with what all processes have looked at."""
        (number,) = self.part.total(len(self.values))
        nth = math.inf
        if rank >= 1 and number:
            keys = ~ordered(torch.from_numpy(self.values))
            (bound,) = kth([keys], [min(rank, number)], self.part.sums)
            upto = bound.last if bound.tied is None else bound.tied
            nth = self.part.least(float(self.values[(keys <= upto).numpy()].min(initial=math.inf)))
        return number, nth, -self.part.least(-float(self.values[self.values < nth].max(initial=-math.inf)))


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


def cuts(near: Callable[[Look], Near], k: int, at_least: Sequence[int], look: Look) -> tuple[list[Cut], Look]:
    """Return where to cut each layer so that ``k`` margins of all are above, and ``at_least`` so many of each.

    It is the same cut for all layers, but for those that would fall below what they have at least. Among equal margins
    at the cut all are above.

    Args:
        near: returns what is known of the margins of all layers, looking no further than its argument.
        k: at least the sum of ``at_least``, at least 1.
        at_least: for each layer.
        look: where to look first.

    Returns:
        The cuts, and where to look next time.

    >>> margins = np.array([0.3, 0.1, -0.2, 0.5, 0.4])
    >>> found, _ = cuts(lambda look: Near([0, 0], [3, 2], margins), 3, [0, 0], Look(0.0, math.inf))
    >>> [round(cut.level, 3) for cut in found]
    [0.2, 0.2]
    """
    first = look
    while True:
        found = _cuts(near(look), k, at_least, whole=math.isinf(look.width))
        if found is not None:
            return found, first.next(found)
        look = look.wider


def _cuts(known: Near, k: int, at_least: Sequence[int], whole: bool) -> list[Cut] | None:
    """Return the cuts, None if too little is known."""
    found: dict[int, Cut | None] = {}
    shared = list(range(len(known.above)))
    while shared:
        cut = _cut(known.layers(shared), k, whole)
        if cut is None:
            return None
        short = [i for i in shared if known.above[i] < at_least[i] and known.layer(i).count(cut.level) < at_least[i]]
        if not short:
            found |= dict.fromkeys(shared, cut)
            break
        found |= {i: _cut(known.layer(i), at_least[i], whole) for i in short}
        k -= sum(at_least[i] for i in short)
        shared = [i for i in shared if i not in short]
    ordered = [found[i] for i in range(len(known.above))]
    return [cut for cut in ordered if cut is not None] if None not in ordered else None


def _cut(known: Near, k: int, whole: bool) -> Cut | None:
    """Return the cut below the ``k``-th largest margin of some layers, None if too little is known."""
    rank = k - sum(known.above)
    number, nth, below = known.ends(rank)
    enough = 1 <= rank < number and below > -math.inf
    return Cut(below, nth, k) if whole or enough else None
