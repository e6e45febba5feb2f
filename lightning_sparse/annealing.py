"""Gradient annealing: how much of their gradient inactive weights get in an epoch (AutoSparse, Eqs. 2-4, 9)."""

from lightning_sparse._lightning import MisconfigurationException
from lightning_sparse.schedules import ANNEALING

__all__ = ["annealed"]


def annealed(alpha: float, decay: str, rate: float, epoch: int, epochs: int | None) -> float:
    """Return ``alpha`` as it is in ``epoch`` (counted from 0) of ``epochs``, None if their number is not known.

    Raises:
        MisconfigurationException: the decay needs the number of epochs, and it is not known.

    >>> annealed(1.0, "linear", 1.0, 1, 4)
    0.75
    """
    if epochs is None and decay not in ("none", "exponential"):
        raise MisconfigurationException(
            f"decay={decay!r} needs the number of epochs: set Trainer(max_epochs=...) or max_steps, "
            "or use decay='exponential' or 'none'."
        )
    return alpha * ANNEALING[decay](epoch, epochs or 1, rate)
