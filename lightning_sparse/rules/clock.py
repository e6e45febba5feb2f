"""Clock: when connections move."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Clock"]


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
