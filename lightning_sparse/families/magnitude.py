"""Pruning by magnitude, of each layer by itself or of all together."""

from collections.abc import Mapping, Sequence

import torch

from lightning_sparse.families.shares import least, unit_counts
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, Scope, shrunk
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.units import Units

__all__ = ["final_densities", "prune"]


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


def final_densities(
    weights: Sequence[Weight],
    pattern: Pattern,
    final: int,
    distribution: Distribution | Mapping[str, float],
    min_layer_density: float,
) -> dict[str, float]:
    """Return the density that each layer has in the end under ``scope="layer"``; arguments as of ``prune``."""
    counts = unit_counts(weights, pattern, distribution, final, min_layer_density)
    return {weight.name: counts[weight.name] / weight.size for weight in weights}
