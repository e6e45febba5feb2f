"""How many connections layers have at least, get of a budget, and lose to and win from each other."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Generator

from lightning_sparse.rules import budgets
from lightning_sparse.rules.budgets import Distribution, Stack, apportion
from lightning_sparse.rules.matrices import Outputs
from lightning_sparse.rules.patterns import UNSTRUCTURED, Pattern
from lightning_sparse.weights.base import Weight

__all__ = [
    "capped_where_nearly_dense",
    "drawn_anywhere",
    "droppable",
    "floors",
    "layer_counts",
    "least",
    "needed",
    "shared_out",
    "unit_counts",
]

#: a layer with a smaller share of zeros is nearly dense (the program of SNFS's authors)
_NEARLY_DENSE = 0.2


class _Sized(Protocol):
    """What a share asks of a weight."""

    name: str
    outputs: Outputs
    nonempty: Outputs | None

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...


def _rows(weight: _Sized) -> int:
    """Return the number of rows of a weight none of which may be empty."""
    return 0 if weight.nonempty is None else weight.nonempty.rows(weight.shape)


def least(weight: _Sized, min_layer_density: float) -> int:
    """Return how many connections a weight keeps at least."""
    return max(budgets.least(min_layer_density, weight.size), _rows(weight))


def floors(
    weights: Sequence[_Sized], min_layer_density: float, total: int, pattern: Pattern = UNSTRUCTURED
) -> list[int]:
    """Return how many of ``total`` connections each weight keeps at least, a number that the pattern allows.

    Raises:
        ValueError: these alone are more than ``total``.
    """
    rows = [pattern.at_least(weight, least(weight, min_layer_density)) for weight in weights]
    return budgets.floors(min_layer_density, [weight.size for weight in weights], total, rows)


def layer_counts(
    weights: Sequence[_Sized],
    distribution: Distribution | Mapping[str, float],
    total: int,
    min_layer_density: float,
) -> dict[str, int]:
    """Divide ``total`` connections among weights, by name; see ``budgets.layer_counts``."""
    rows = [_rows(weight) for weight in weights]
    return budgets.layer_counts(distribution, _shapes(weights), total, min_layer_density, rows)


def unit_counts(
    weights: Sequence[Weight],
    pattern: Pattern,
    distribution: Distribution | Mapping[str, float],
    total: int,
    min_layer_density: float,
) -> dict[str, int]:
    """Divide ``total`` units of a pattern among weights, by name, so that layers have the densities of their shapes."""
    shapes = _shapes([weight.whole for weight in weights])
    rows = [pattern.at_least(weight, least(weight, min_layer_density)) for weight in weights]
    sizes = [weight.size for weight in weights]
    capacities = [pattern.capacity(weight) for weight in weights]
    return budgets.layer_counts(distribution, shapes, total, min_layer_density, rows, sizes, capacities)


def _shapes(weights: Sequence[_Sized]) -> dict[str, tuple[int, ...]]:
    return {weight.name: Stack(weight.shape) if weight.outputs.stacked else weight.shape for weight in weights}


def droppable(weights: Sequence[Weight], wanted: Sequence[int], min_layer_density: float) -> list[int]:
    """Return how many connections each layer loses to all: those ``wanted``, but not more than there is room for.

    A layer keeps what ``min_layer_density`` asks for, counting the places it has free, and one in each row that may not
    be empty. A dense one may lose some.
    """
    loss = [
        min(n, weight.size - least(weight, min_layer_density), max(0, weight.num_active - _rows(weight)))
        for weight, n in zip(weights, wanted, strict=True)
    ]
    return apportion(min(sum(loss), sum(weight.num_inactive for weight in weights)), loss, loss)


def capped_where_nearly_dense(weights: Sequence[Weight], wanted: Sequence[int], claims: Sequence[float]) -> list[int]:
    """Return how many connections each layer is to lose, ``wanted`` or less.

    A nearly dense layer that claims more than an even share loses no more than its own share of zeros.
    """
    even = sum(claims) / max(len(claims), 1)
    return [
        min(n, weight.num_inactive * weight.num_active // weight.size) if claim > even and _nearly_dense(weight) else n
        for weight, n, claim in zip(weights, wanted, claims, strict=True)
    ]


def _nearly_dense(weight: Weight) -> bool:
    return weight.num_inactive < _NEARLY_DENSE * weight.size


def needed(weights: Sequence[Weight], dropped: Sequence[int], min_layer_density: float) -> list[int]:
    """Return how many connections each layer must get back, having lost ``dropped``, for ``min_layer_density``."""
    left = [weight.num_active - n for weight, n in zip(weights, dropped, strict=True)]
    return [max(0, least(weight, min_layer_density) - n) for weight, n in zip(weights, left, strict=True)]


def shared_out(
    weights: Sequence[Weight], dropped: Sequence[int], claims: Sequence[float], min_layer_density: float
) -> list[int]:
    """Divide what was ``dropped`` among the layers in proportion to their ``claims``, as far as they have room."""
    first = needed(weights, dropped, min_layer_density)
    room = [weight.num_inactive - n for weight, n in zip(weights, first, strict=True)]
    more = apportion(sum(dropped) - sum(first), claims, room)
    return [n + extra for n, extra in zip(first, more, strict=True)]


def drawn_anywhere(
    weights: Sequence[Weight], dropped: Sequence[int], min_layer_density: float, generator: Generator
) -> list[int]:
    """Draw how many connections each layer gets of all that were ``dropped``: each free place is equally likely.

    The places that were just left come last.
    """
    grows = needed(weights, dropped, min_layer_density)
    room = [weight.num_inactive for weight in weights]
    with_own = [places + n for places, n in zip(room, dropped, strict=True)]
    for places in (room, with_own):
        open_ = [max(0, n - taken) for n, taken in zip(places, grows, strict=True)]
        extra = _drawn(min(sum(dropped) - sum(grows), sum(open_)), open_, generator)
        grows = [n + more for n, more in zip(grows, extra, strict=True)]
    return grows


def _drawn(n: int, places: Sequence[int], generator: Generator) -> list[int]:
    """Return how many of ``n`` draws without replacement fall to each of the groups of ``places``."""
    if n <= 0:
        return [0] * len(places)
    ends = torch.tensor(places).cumsum(0)
    positions = torch.randperm(int(ends[-1]), generator=generator)[:n]
    owners = torch.bucketize(positions, ends, right=True)
    counts: list[int] = torch.bincount(owners, minlength=len(places)).tolist()
    return counts
