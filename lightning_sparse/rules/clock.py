"""Clock: when connections move."""

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

    >>> [tick for tick in range(12) if Clock(every=3, end=10, closing=10).is_due(tick)]
    [3, 6, 9, 10]
    """

    every: int
    end: float
    begin: int = 0
    closing: int | None = None

    def is_due(self, tick: int) -> bool:
        """Tell whether connections move at this tick."""
        regular = self.begin < tick < self.end and (tick - self.begin) % self.every == 0
        return regular or tick == self.closing
