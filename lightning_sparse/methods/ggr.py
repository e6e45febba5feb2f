"""GGR: global gradient-based redistribution (Parger et al., ICML 2022).

Section 3. Decisions: connections that were just dropped are not candidates for growth; the odd one of a layer's number
goes by gradient; the step that moves connections applies its update, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import sampling, select
from lightning_sparse.rules.budgets import share
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Weight

__all__ = ["GGR"]

NEW = 1e-10  # Sec. 3.3: active, though tiny


class GGR(SparseStorage, PruneAndGrow):
    """Global Gradient-based Redistribution: layers get new connections as they win in a ranking of all gradients.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        drop_fraction: the paper's rho, share of a layer's connections that the first update drops, in (0, 1].
        random_share: share of a layer's new connections that are drawn at random; the others are those of largest
            gradient. 0 and 1 are the paper's ablations GGR-RigL and GGR-SET.
        decay: how ``drop_fraction`` falls until the end of the updates: ``"cosine"`` (the paper's), ``"linear"``,
            ``"none"``.
        update_every: number of optimizer steps from update to update; None (the paper's): at the first step of each
            epoch but the first.
        stop_at: share of the training after which connections stay, in (0, 1].
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only); updates compute the
            gradient of some rows at a time.
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import GGR
        >>> callback = GGR(sparsity=0.97, distribution="uniform")

    Reference:
        "Gradient-based Weight Density Balancing for Robust Dynamic Sparse Training", ICML 2022.
    """

    resizes = True
    dense_gradient_to_move = True

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.1,
        random_share: float = 0.5,
        decay: Decay = "cosine",
        update_every: int | None = None,
        stop_at: float = 0.5,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)
        checks.fraction("The paper's value is 0.5.", random_share=random_share)
        self.random_share = random_share

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of each layer, and grow as many as it wins in the ranking, some at random."""
        drops = self.to_drop(weights, [share(fraction, weight.active) for weight in weights])
        ranked = ranking(weights, sum(drops), self.needed(weights, drops))
        for weight, fewer, (won, gradients) in zip(weights, drops, ranked, strict=True):
            at_random = share(self.random_share, len(won))
            grown = won[select.top_k_positions(gradients, len(won) - at_random)]
            taken = sampling.merged(weight.positions, grown)
            drawn = sampling.free_positions(at_random, taken, weight.size, self.generator)
            weight.exchange(weight.smallest(fewer), sampling.merged(grown, drawn), value=NEW)


def ranking(weights: Sequence[Weight], k: int, at_least: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return which inactive connections are the ``k`` of largest ``|dP|`` of all layers together, for each layer.

    The layers are taken one after the other, and only the best so far are kept (Sec. 3.3); what cannot be among them,
    as samples of all layers tell, is left out from the start.

    Args:
        weights: the layers.
        k: how many in all; of equals those of the earlier layer, and in it of the earlier position.
        at_least: so many of each layer's largest are among them in any case.

    Returns:
        Flat positions, ascending, and their ``|dP|``.
    """
    bound = select.likely_bound(
        sum(weight.size for weight in weights), k, lambda stride: [weight.free_sample(stride) for weight in weights]
    )
    ranked = _ranking(weights, k, at_least, -1.0 if bound is None else float(bound))
    if sum(len(won) for won, _ in ranked) < k:  # the sample was misleading
        ranked = _ranking(weights, k, at_least, -1.0)
    return ranked


def _ranking(weights: Sequence[Weight], k: int, at_least: Sequence[int], bound: float) -> list[tuple[Tensor, Tensor]]:
    """Return the ranking of what is larger than ``bound`` or among ``at_least``."""
    extra = k - sum(at_least)
    best, places, ends = torch.empty(0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    sure: dict[int, tuple[Tensor, Tensor]] = {}
    for owner, (weight, least) in enumerate(zip(weights, at_least, strict=True)):
        found, gradients = weight.steepest(least + extra, above=-1.0 if least else bound)
        if least:
            first = select.top_k(gradients, least)
            sure[owner] = found[first], gradients[first]
            rest = ~first & (gradients > bound)
            found, gradients = found[rest], gradients[rest]
        best, places = torch.cat((best.to(gradients), gradients)), torch.cat((places, found))
        ends = torch.cat((ends, torch.tensor([len(best)])))  # those of each layer lie together
        if len(best) > 2 * extra or (owner + 1 == len(weights) and len(best) > extra):
            kept = select.top_k_positions(best, extra)
            best, places, ends = best[kept], places[kept], torch.searchsorted(kept, ends)
            bound = float(best.min()) if extra else bound  # a tie comes later, and loses
    ranked = list(zip(places.tensor_split(ends[:-1]), best.tensor_split(ends[:-1]), strict=True))
    for owner, (found, gradients) in sure.items():
        positions, order = torch.cat((found, ranked[owner][0])).sort()
        ranked[owner] = positions, torch.cat((gradients, ranked[owner][1]))[order]
    return ranked
