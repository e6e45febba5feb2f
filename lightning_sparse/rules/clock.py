"""Clock: when connections move, and how often where nobody says so."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["FEW", "UPDATES", "Clock", "interval", "spoken", "times"]

#: fewer updates than this are too few for a method to show what it can do
FEW = 5

#: an interval that adapts gives a training this number of updates, unless the paper's interval gives it more
UPDATES = 10


def interval(paper: int, ticks: float) -> int:
    """Return the paper's interval, or a shorter one with which ``ticks`` hold at least ``UPDATES`` updates.

    Args:
        paper: number of ticks from update to update in the paper.
        ticks: number of ticks of this training in which there may be updates.

    >>> interval(100, 75_000), interval(100, 258)
    (100, 23)
    """
    return paper if math.isinf(ticks) else min(paper, max(1, math.floor(ticks / (UPDATES + 1))))


def times(n: int) -> str:
    """Say how often.

    >>> times(1), times(3)
    ('once', '3 times')
    """
    return "once" if n == 1 else f"{n} times"


def spoken(ticks: Sequence[int], every: int, unit: str = "step") -> str:
    """Say when something happens, at one tick or more.

    >>> print(spoken([2, 4, 6], every=2), spoken([1, 2], 1, "epoch"), spoken([7], 5), sep="; ")
    3 times, every 2 steps from step 2 to 6; 2 times, every epoch from epoch 1 to 2; once, at step 7
    """
    often = f"every {every} {unit}s" if every > 1 else f"every {unit}"
    when = f"at {unit} {ticks[0]}" if len(ticks) == 1 else f"{often} from {unit} {ticks[0]} to {ticks[-1]}"
    return f"{times(len(ticks))}, {when}"


@dataclass(frozen=True)
class Clock:
    """Every so many ticks between two of them; a tick is an optimizer step or an epoch.

    Attributes:
        every: number of ticks from update to update, at least 1.
        end: there are updates before this tick only.
        begin: there are updates after this tick only; intervals are counted from it.
        closing: one more update falls on this tick, wherever it lies.
        doubling: the interval doubles after each of these ticks.

    >>> [tick for tick in range(12) if Clock(every=3, end=10, closing=10).is_due(tick)]
    [3, 6, 9, 10]
    >>> [tick for tick in range(30) if Clock(every=2, end=30, doubling=(8, 18)).is_due(tick)]
    [2, 4, 6, 8, 12, 16, 24]
    """

    every: int
    end: float
    begin: int = 0
    closing: int | None = None
    doubling: Sequence[float] = ()

    def is_due(self, tick: int) -> bool:
        """Tell whether connections move at this tick."""
        every = self.every << sum(tick > after for after in self.doubling)
        regular = self.begin < tick < self.end and (tick - self.begin) % every == 0
        return regular or tick == self.closing

    def ticks(self, last: int) -> Iterator[int]:
        """Yield the ticks, up to ``last``, at which connections move."""
        regular = range(self.begin + self.every, math.ceil(min(self.end, last + 1)), self.every)
        yield from filter(self.is_due, regular)
        if self.closing is not None and self.closing not in regular:
            yield self.closing
