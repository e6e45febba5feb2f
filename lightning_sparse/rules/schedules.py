"""Schedules: pure functions of progress.

The decays are AutoSparse's annealing, Eqs. 2-4: each takes the share ``p`` of the way that is done, at least 0 (beyond
1 it is taken for 1), and returns a factor that falls from 1 to 0, or nearly.
"""

import math
from collections.abc import Callable
from typing import Literal

from lightning_sparse.compat.lightning import MisconfigurationException

__all__ = [
    "DECAYS",
    "Annealing",
    "Decay",
    "annealed",
    "cosine",
    "cubic",
    "halving",
    "linear",
    "logistic",
    "none",
    "sigmoid",
    "sigmoid_cosine",
]


def none(p: float) -> float:
    """No decay: 1."""
    return 1.0


def linear(p: float) -> float:
    """Return ``1 - p``.

    >>> linear(0.25)
    0.75
    """
    return 1 - min(p, 1)


def cosine(p: float) -> float:
    """Return ``(1 + cos(pi p)) / 2`` (AutoSparse, Eq. 2)."""
    return (1 + math.cos(math.pi * min(p, 1))) / 2


def sigmoid(p: float) -> float:
    """Return the falling logistic curve ``1 - 1 / (1 + exp(6 - 12 p))`` (AutoSparse, Eq. 3)."""
    return 1 / (1 + math.exp(-6 + 12 * min(p, 1)))


def sigmoid_cosine(p: float) -> float:
    """Return the larger of the two above (AutoSparse, Eq. 4)."""
    return max(sigmoid(p), cosine(p))


def logistic(p: float, steepness: float) -> float:
    """Return the rising logistic curve ``1 / (1 + exp(-s (p - 1/2)))`` of the steepness s (OptG).

    >>> logistic(0.5, 10.0), round(logistic(1.0, 10.0), 4)
    (0.5, 0.9933)
    """
    return 0.5 * (1 + math.tanh(steepness * (min(p, 1.0) - 0.5) / 2))  # exp would overflow


def cubic(p: float) -> float:
    """Return ``(1 - p)^3``, the part that is left to prune (GMP, Eq. 1); 1 before the start and 0 after the end.

    >>> cubic(0.5), cubic(1.5)
    (0.125, 0.0)
    """
    return (1 - min(max(p, 0.0), 1.0)) ** 3


def halving(p: float) -> float:
    """Return 1 in the first three quarters of the way, then 1/2, and 0 from its end on (MEST, the authors' scripts).

    >>> [halving(p) for p in (0.0, 0.74, 0.75, 0.99, 1.0)]
    [1.0, 1.0, 0.5, 0.5, 0.0]
    """
    return 1.0 if p < 0.75 else 0.5 if p < 1 else 0.0


Decay = Literal["none", "linear", "cosine", "sigmoid", "sigmoid_cosine", "halving"]
Annealing = Literal[Decay, "exponential"]

DECAYS: dict[str, Callable[[float], float]] = {
    function.__name__: function for function in (none, linear, cosine, sigmoid, sigmoid_cosine, halving)
}


def annealed(alpha: float, decay: Annealing, rate: float, epoch: int, epochs: int | None) -> float:
    """Return ``alpha``, the share of their gradient that inactive weights get, in an epoch (AutoSparse, Eqs. 2-4, 9).

    Args:
        alpha: where annealing starts.
        decay: of ``DECAYS``, or "exponential" (Eq. 9), ``exp(-rate epoch)``.
        rate: of the exponential, per epoch.
        epoch: counted from 0.
        epochs: their number; None if it is not known.

    Raises:
        MisconfigurationException: the decay needs the number of epochs, and it is not known.

    >>> annealed(1.0, "linear", 1.0, 1, 4)
    0.75
    """
    if decay == "exponential":
        return alpha * math.exp(-rate * epoch)
    if epochs is None and decay != "none":
        raise MisconfigurationException(
            f"decay={decay!r} needs the number of epochs: set Trainer(max_epochs=...) or max_steps, "
            "or use decay='exponential' or 'none'."
        )
    return alpha * DECAYS[decay](epoch / (epochs or 1))
