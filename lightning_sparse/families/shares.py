"""How many connections layers lose to and win from each other, in an update that moves them between layers."""

from collections.abc import Sequence

from lightning_sparse.rules.budgets import apportion, least
from lightning_sparse.weights.base import Weight

__all__ = ["droppable", "needed", "shared_out"]


def droppable(weights: Sequence[Weight], wanted: Sequence[int], min_layer_density: float) -> list[int]:
    """Return how many connections each layer loses to all: those ``wanted``, but not more than there is room for.

    A layer keeps what ``min_layer_density`` asks for, counting the places it has free. A dense one may lose some.
    """
    floors = [least(min_layer_density, weight.size) for weight in weights]
    loss = [min(n, weight.size - floor) for weight, n, floor in zip(weights, wanted, floors, strict=True)]
    return apportion(min(sum(loss), sum(weight.num_inactive for weight in weights)), loss, loss)


def needed(weights: Sequence[Weight], dropped: Sequence[int], min_layer_density: float) -> list[int]:
    """Return how many connections each layer must get back, having lost ``dropped``, for ``min_layer_density``."""
    left = [weight.num_active - n for weight, n in zip(weights, dropped, strict=True)]
    return [max(0, least(min_layer_density, w.size) - n) for w, n in zip(weights, left, strict=True)]


def shared_out(
    weights: Sequence[Weight], dropped: Sequence[int], claims: Sequence[float], min_layer_density: float
) -> list[int]:
    """Divide what was ``dropped`` among the layers in proportion to their ``claims``, as far as they have room."""
    first = needed(weights, dropped, min_layer_density)
    room = [weight.num_inactive - n for weight, n in zip(weights, first, strict=True)]
    more = apportion(sum(dropped) - sum(first), claims, room)
    return [n + extra for n, extra in zip(first, more, strict=True)]
