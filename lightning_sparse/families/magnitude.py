"""Pruning by magnitude, of each layer by itself or of all together."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from lightning_sparse.families.shares import least, unit_counts
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, Scope, shrunk
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup, WeightGroups
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.units import Units

__all__ = ["planned_density", "prune"]


class _Method(Protocol):
    """What the planned density asks of its method."""

    scope: Scope
    pattern: Pattern
    distribution: Distribution | Mapping[str, float]
    min_layer_density: float
    _groups: WeightGroups

    def units(self, weights: Sequence[Weight]) -> list[Weight]: ...

    def final(self, group: WeightGroup) -> int: ...


def prune(
    weights: Sequence[Weight],
    pattern: Pattern,
    total: int,
    final: int,
    scope: Scope,
    distribution: Distribution | Mapping[str, float],
    min_layer_density: float,
) -> None:
    """Keep the connections of largest ``|W|``, exactly ``total`` of all weights.

    Args:
        weights: of one optimizer; dense parameters, or views of them with the units of a pattern.
        pattern: which connections go together.
        total: how many to keep now.
        final: how many the last pruning keeps.
        scope: the largest of all weights (``"global"``), or as many of each ``"layer"`` as go from what it has to its
            final number in equal proportions.
        distribution: under ``scope="layer"``, how ``final`` is divided; see ``MaskedCallback``.
        min_layer_density: no weight falls below this density.
    """
    held = [weight for weight in weights if isinstance(weight, (MaskedWeight, Units))]
    assert len(held) == len(weights)
    if scope == "global":
        counts = pattern.count_global_top_k(
            held,
            [weight.W for weight in held],
            total,
            [weight.mask for weight in held],
            [least(weight, min_layer_density) for weight in weights],
            score=torch.abs,
        )
    else:
        ends = unit_counts(weights, pattern, distribution, final, min_layer_density)
        counts = shrunk([weight.num_active for weight in held], list(ends.values()), total)
    for weight, count in zip(held, counts, strict=True):
        magnitudes = select.first_of_rows(weight.W.abs(), weight.nonempty, among=weight.mask)
        weight.keep(pattern.top_k(weight, magnitudes, count, among=weight.mask))


def planned_density(method: _Method) -> dict[str, float]:
    """Return the density that each layer of a method ends with, unless they compete, by name."""
    if method.scope == "global":
        return {}
    ends: dict[str, float] = {}
    for group in method._groups:
        weights, final = method.units(group.weights), method.final(group)
        counts = unit_counts(weights, method.pattern, method.distribution, final, method.min_layer_density)
        ends |= {weight.name: counts[weight.name] / weight.size for weight in weights}
    return ends
