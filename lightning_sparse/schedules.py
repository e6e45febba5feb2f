"""Schedules: pure functions of progress.

Annealing of AutoSparse's alpha, the paper's Eqs. 2-4 and 9. Each takes the epoch ``i`` (0, 1, ...), the number of
epochs ``T`` and the rate ``beta`` (used by the exponential alone), and returns a factor in [0, 1].
"""

import math
from collections.abc import Callable

__all__ = ["ANNEALING", "cosine", "cubic", "exponential", "linear", "none", "sigmoid", "sigmoid_cosine"]


def none(i: float, T: float, beta: float = 1.0) -> float:
    """No annealing: 1."""
    return 1.0


def linear(i: float, T: float, beta: float = 1.0) -> float:
    """Return ``1 - i / T``.

    >>> linear(1, 4)
    0.75
    """
    return 1 - min(i / T, 1)


def cosine(i: float, T: float, beta: float = 1.0) -> float:
    """Return ``(1 + cos(pi i / T)) / 2`` (AutoSparse, Eq. 2)."""
    return (1 + math.cos(math.pi * min(i / T, 1))) / 2


def sigmoid(i: float, T: float, beta: float = 1.0) -> float:
    """Return the falling logistic curve ``1 - 1 / (1 + exp(6 - 12 i / T))`` (AutoSparse, Eq. 3)."""
    return 1 / (1 + math.exp(-6 + 12 * min(i / T, 1)))


def sigmoid_cosine(i: float, T: float, beta: float = 1.0) -> float:
    """Return the larger of the two above (AutoSparse, Eq. 4)."""
    return max(sigmoid(i, T), cosine(i, T))


def exponential(i: float, T: float, beta: float = 1.0) -> float:
    """Return ``exp(-beta i)`` (AutoSparse, Eq. 9); the number of epochs plays no part."""
    return math.exp(-beta * i)


def cubic(i: float, T: float) -> float:
    """Return ``(1 - i / T)^3``, the part that is left to prune (GMP, Eq. 1); 1 before the start and 0 after the end.

    >>> cubic(1, 2), cubic(3, 2)
    (0.125, 0.0)
    """
    return 0.0 if i >= T else (1 - max(i, 0) / T) ** 3


ANNEALING: dict[str, Callable[[float, float, float], float]] = {
    function.__name__: function for function in (none, linear, cosine, sigmoid, sigmoid_cosine, exponential)
}
