"""Pruning by magnitude, of each layer by itself or of all together."""

from collections.abc import Mapping, Sequence

import torch

from lightning_sparse.families.shares import layer_counts, least
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, Scope, shrunk
from lightning_sparse.rules.parts import together
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import dense

__all__ = ["final_counts", "prune"]


def prune(
    weights: Sequence[Weight],
    total: int,
    final: int,
    scope: Scope,
    distribution: Distribution | Mapping[str, float],
    min_layer_density: float,
) -> None:
    """Keep the connections of largest ``|W|``, exactly ``total`` of all weights.

    Args:
        weights: of one optimizer; dense parameters.
        total: how many to keep now.
        final: how many the last pruning keeps.
        scope: the largest of all weights (``"global"``), or as many of each ``"layer"`` as go from what it has to its
            final number in equal proportions.
        distribution: under ``scope="layer"``, how ``final`` is divided; see ``MaskedCallback``.
        min_layer_density: no weight falls below this density.
    """
    held = dense(weights)
    if scope == "global":
        counts = together(held).count_global_top_k(
            [weight.W for weight in held],
            total,
            [weight.mask for weight in held],
            [least(weight, min_layer_density) for weight in weights],
            score=torch.abs,
        )
    else:
        ends = final_counts(weights, final, distribution, min_layer_density)
        counts = shrunk([weight.num_active for weight in held], list(ends.values()), total)
    for weight, count in zip(held, counts, strict=True):
        magnitudes = select.first_of_rows(weight.W.abs(), weight.nonempty, among=weight.mask)
        weight.keep(weight.part.top_k(magnitudes, count, among=weight.mask))


def final_counts(
    weights: Sequence[Weight],
    final: int,
    distribution: Distribution | Mapping[str, float],
    min_layer_density: float,
) -> dict[str, int]:
    """Return how many connections each layer has in the end under ``scope="layer"``; arguments as of ``prune``."""
    return layer_counts(weights, distribution, final, min_layer_density)
