"""Trainings: a fit that is divided into trainings of equal length, between which it goes back to an early point."""

import math
from dataclasses import dataclass
from itertools import count, islice

__all__ = ["Trainings", "divided", "gentle_rounds", "good_totals", "settled"]

#: units, such as epochs, that a training should have at least: shorter ones learn too little to be pruned by
_ENOUGH = 5


@dataclass(frozen=True)
class Trainings:
    """One training from 0 on, and ``rounds`` more, each from ``point`` on. All in the same unit, such as steps.

    Attributes:
        rounds: how often the fit goes back, at least 0.
        point: the position to which it goes back.
        length: of each training from there on.

    >>> trainings = Trainings(rounds=2, point=10, length=30)
    >>> [trainings.behind(position) for position in (0, 39, 40, 69, 70, 99, 100)], trainings.last
    ([0, 0, 1, 1, 2, 2, 2], 70)
    """

    rounds: int
    point: int
    length: int

    @property
    def last(self) -> int:
        """The position at which the last training begins."""
        return self.point + self.rounds * self.length

    @property
    def first(self) -> int:
        """Length of the first training."""
        return self.point + self.length

    @property
    def total(self) -> int:
        """Length of all of them."""
        return self.last + self.length

    def behind(self, position: int) -> int:
        """Return how often the fit has gone back when it comes to a position."""
        return min(max(position - self.point, 0) // self.length, self.rounds)


def divided(total: int, point: int, rounds: int, unit: int) -> Trainings | None:
    """Return the trainings that make up ``total``, None unless they are equal and of whole units.

    >>> divided(100, 10, 2, 15), divided(100, 10, 2, 20)
    (Trainings(rounds=2, point=10, length=30), None)
    """
    length, rest = divmod(total - point, rounds + 1)
    return None if rest or length < unit or length % unit else Trainings(rounds, point, length)


def settled(total: int, point: int, rounds: range, unit: int) -> Trainings | None:
    """Return the trainings of the most ``rounds`` that leave each five units, else of the fewest; None if none divide.

    >>> [settled(total, 0, range(1, 11), 1) for total in (55, 24, 8)]  # doctest: +NORMALIZE_WHITESPACE
    [Trainings(rounds=10, point=0, length=5), Trainings(rounds=3, point=0, length=6),
     Trainings(rounds=1, point=0, length=4)]
    """
    found = [trainings for n in rounds if (trainings := divided(total, point, n, unit))]
    long = [trainings for trainings in found if trainings.length >= _ENOUGH * unit]
    return long[-1] if long else found[0] if found else None


def gentle_rounds(sparsity: float, share: float = 0.2) -> int:
    """Return the number of rounds that each prune about ``share`` of what is left, at least 1.

    >>> [gentle_rounds(sparsity) for sparsity in (0.0, 0.5, 0.9, 0.98)]
    [1, 3, 10, 18]
    """
    return max(1, round(math.log(1 - sparsity) / math.log(1 - share)))


def good_totals(total: int, point: int, rounds: range, unit: int) -> list[int]:
    """Return two totals that one of these numbers of rounds divides: that next to ``total`` on each side, if it can be.

    >>> good_totals(70, 0, range(2, 3), 10), good_totals(20, 0, range(2, 3), 10), good_totals(130, 0, range(1, 11), 10)
    ([60, 90], [30, 60], [120, 140])
    """
    whole = max(total - point, 0) // unit

    def fits(units: int) -> bool:
        return any(units % (n + 1) == 0 for n in rounds)

    below = next(([units] for units in range(whole, 0, -1) if fits(units)), [])
    above = islice(filter(fits, count(whole + 1)), 2 - len(below))
    return [point + units * unit for units in (*below, *above)]
