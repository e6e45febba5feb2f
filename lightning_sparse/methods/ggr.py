"""GGR: global gradient-based redistribution (Parger et al., ICML 2022).

Section 3. Decisions: connections that were just dropped are not candidates for growth; the odd one of a layer's number
goes by gradient; the step that moves connections applies its update, too.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sparse import checks, masks
from lightning_sparse.distributions import share
from lightning_sparse.masked import MaskedWeight
from lightning_sparse.prune_and_grow import PruneAndGrow

__all__ = ["GGR"]

NEW = 1e-10  # Sec. 3.3: active, though tiny


class GGR(PruneAndGrow):
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
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import GGR
        >>> callback = GGR(sparsity=0.97, distribution="uniform")

    Reference:
        "Gradient-based Weight Density Balancing for Robust Dynamic Sparse Training", ICML 2022.
    """

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.1,
        random_share: float = 0.5,
        decay: str = "cosine",
        update_every: int | None = None,
        stop_at: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, **options)
        checks.fraction("The paper's value is 0.5.", random_share=random_share)
        self.random_share = random_share

    def update(self, weights: Sequence[MaskedWeight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of each layer; count the winners of the global top-k of ``|dP|``; fill them in."""
        drops = self.to_drop(weights, [share(fraction, weight.active) for weight in weights])
        free = [~weight.mask for weight in weights]
        gradients = [weight.dP for weight in weights]
        grows = masks.count_global_top_k(gradients, sum(drops), free, self.needed(weights, drops), score=torch.abs)
        for weight, places, fewer, more in zip(weights, free, drops, grows, strict=True):
            at_random = share(self.random_share, more)
            dropped = masks.lowest(weight.W.abs(), fewer, among=weight.mask)
            grown = masks.top_k(weight.dP.abs(), more - at_random, among=places)
            grown |= masks.random(places & ~grown, at_random, self.generator)
            weight.change(dropped, grown, value=NEW)
