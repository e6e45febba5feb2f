"""Phases: a training that is dense and sparse in turn."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["PAPER_CYCLES", "Bounds", "Phases", "alternating", "bounds", "cycles_that_fit"]

#: sparse phases before the last one in the paper's training of 100 epochs (AC/DC, Sec. 4)
PAPER_CYCLES = 7

#: sparse phases before the last one that a training has if none of its phases can last an epoch
_FEWEST_CYCLES = 2


@dataclass(frozen=True)
class Phases:
    """Phases numbered from 0 on: those with even numbers are dense, those with odd numbers are sparse.

    Attributes:
        begins: the step with which each phase but the first begins, ascending.

    >>> phases = Phases((2, 5, 9))
    >>> [phases.at(step) for step in (0, 1, 2, 4, 5, 9, 99)], phases.last
    ([0, 0, 1, 1, 2, 3, 3], 3)
    """

    begins: tuple[int, ...] = ()

    def at(self, step: int) -> int:
        """Return the number of the phase that a step belongs to."""
        return bisect_right(self.begins, step)

    @property
    def last(self) -> int:
        """The number of the last phase."""
        return len(self.begins)


class Bounds(NamedTuple):
    """The steps at which the first sparse phase, the last dense one and the last sparse one begin."""

    begin: int
    last_dense: int
    end: int

    @property
    def between(self) -> int:
        """Number of steps of the phases of equal length."""
        return max(0, self.last_dense - self.begin)

    @property
    def most_cycles(self) -> int:
        """Number of sparse phases that these steps hold at most."""
        return (self.between + 1) // 2


def bounds(total: int, begin_at: float, last_dense: float, end_at: float) -> Bounds:
    """Return the bounds in a training of ``total`` steps.

    Args:
        total: at least 1.
        begin_at: share of the training after which the dense warm-up ends.
        last_dense: share that the last dense phase takes; it has a step at least.
        end_at: share after which the last sparse phase begins, which has a step at least.

    >>> bounds(100, 0.1, 0.1, 0.85), bounds(2, 0.1, 0.1, 0.85)
    (Bounds(begin=10, last_dense=75, end=85), Bounds(begin=0, last_dense=0, end=1))
    """
    end = min(round(end_at * total), total - 1)
    last = end - max(1, round(last_dense * total))
    return Bounds(max(0, min(round(begin_at * total), last - 1)), last, end)


def cycles_that_fit(steps: int, epoch: int) -> int:
    """Return how many sparse phases, with dense ones between them, the paper's number or fewer, ``steps`` hold.

    Each phase lasts an epoch or more. If that leaves fewer than two, they are shorter.

    Args:
        steps: of all these phases.
        epoch: number of steps of an epoch, at least 1.

    >>> cycles_that_fit(65, 1), cycles_that_fit(65, 9), cycles_that_fit(65, 100), cycles_that_fit(1, 100)
    (7, 4, 2, 1)
    """
    by_epochs = (steps // epoch + 1) // 2
    return min(max(by_epochs, _FEWEST_CYCLES), (steps + 1) // 2, PAPER_CYCLES)


def alternating(begin: int, last_dense: int, end: int, cycles: int) -> Phases:
    """Return phases of equal length between two steps, then the last dense one and the last sparse one.

    Args:
        begin: the step after the dense warm-up, at which the first sparse phase begins.
        last_dense: the step at which the last dense phase begins.
        end: the step at which the last sparse phase begins.
        cycles: number of sparse phases from ``begin`` to ``last_dense``; 0: dense up to ``end``.

    >>> alternating(10, 75, 85, 7).begins
    (10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85)
    """
    if not cycles:
        return Phases((end,))
    between = 2 * cycles - 1
    span = last_dense - begin
    return Phases((*(begin + span * i // between for i in range(between)), last_dense, end))
