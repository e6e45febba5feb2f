"""Ranking: the inactive connections of largest gradient among all layers (GGR, Sec. 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.rules import select, ties
from lightning_sparse.rules.criteria import Connections

__all__ = ["ranking"]


def ranking(weights: Sequence[Connections], k: int, at_least: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return which inactive connections are the ``k`` of largest ``|dP|`` of all layers together, for each layer.

    The layers are taken one after the other, and only the best so far are kept (Sec. 3.3); what cannot be among them,
    as samples of all layers tell, is left out from the start.

    Args:
        weights: the layers.
        k: how many in all; of equals, layers get a share in proportion to how many they have.
        at_least: so many of each layer's largest are among them in any case.

    Returns:
        Flat positions, ascending, and their ``|dP|``.
    """
    bound = select.likely_bound(
        sum(weight.size for weight in weights), k, lambda stride: [weight.sample_inactive(stride) for weight in weights]
    )
    ranked = _ranking(weights, k, at_least, 0.0 if bound is None else float(bound))
    if sum(len(won) for won, _ in ranked) < k:  # the sample was misleading
        ranked = _ranking(weights, k, at_least, 0.0)
    return ranked


def _ranking(
    weights: Sequence[Connections], k: int, at_least: Sequence[int], bound: float
) -> list[tuple[Tensor, Tensor]]:
    """Return the ranking of what is ``bound`` or more, or among ``at_least``."""
    extra = k - sum(at_least)
    best, places, ends = torch.empty(0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    sure: dict[int, tuple[Tensor, Tensor]] = {}
    for owner, (weight, least) in enumerate(zip(weights, at_least, strict=True)):
        found, gradients = weight.largest_gradients(least + extra, at_least=0.0 if least else bound)
        if least:
            first = select.top_k(gradients, least, order=ties.at(found, weight.shape))
            sure[owner] = found[first], gradients[first]
            rest = ~first & (gradients >= bound)
            found, gradients = found[rest], gradients[rest]
        best, places = torch.cat((best.to(gradients), gradients)), torch.cat((places, found))
        ends = torch.cat((ends, torch.tensor([len(best)])))  # those of each layer lie together
        if len(best) > 2 * extra or (owner + 1 == len(weights) and len(best) > extra):
            kept = select.top_k_positions(best, extra, order=_across(weights, places, ends))
            best, places, ends = best[kept], places[kept], torch.searchsorted(kept, ends)
            bound = float(best.min()) if extra else bound
    ranked = list(zip(places.tensor_split(ends[:-1]), best.tensor_split(ends[:-1]), strict=True))
    for owner, (found, gradients) in sure.items():
        positions, order = torch.cat((found, ranked[owner][0])).sort()
        ranked[owner] = positions, torch.cat((gradients, ranked[owner][1]))[order]
    return ranked


def _across(weights: Sequence[Connections], places: Tensor, ends: Tensor) -> ties.Order:
    """Return the order of positions in several layers: by the share of its layer's order that lies before each."""

    def order(indices: Tensor) -> Tensor:
        owners = torch.searchsorted(ends, indices, right=True)
        shares = torch.empty(len(indices), dtype=torch.float64)
        for owner, weight in enumerate(weights[: len(ends)]):
            own = owners == owner
            shares[own] = ties.spread(places[indices[own]], weight.shape).double() / weight.size
        return shares

    return order
