"""SNFS: sparse networks from scratch by sparse momentum (Dettmers & Zettlemoyer, 2019).

Algorithm 1. Decisions: the momentum is an exponential average of the dense gradient that the method keeps by itself, so
any optimizer will do, and new connections may grow wherever it is large; a layer that gets more than it has room for
passes the rest on to the others in proportion; connections that were just dropped are not grown again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import share
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.weights.base import Weight, finite

__all__ = ["SNFS"]


class SNFS(PruneAndGrow):
    """Sparse Momentum: layers whose connections have the larger momentum on average get more of them.

    It keeps a dense average of gradients beside each weight and needs dense weight gradients at every step.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        drop_fraction: share of a layer's connections that the first update drops, in (0, 1].
        smoothing: the average keeps so much of its past at each step, in [0, 1).
        decay: how ``drop_fraction`` falls until the end of the updates: ``"cosine"``, ``"linear"``, ``"none"``.
        update_every: number of optimizer steps from update to update; None (the paper's): at the first step of each
            epoch but the first.
        stop_at: share of the training after which connections stay, in (0, 1].
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import SNFS
        >>> callback = SNFS(sparsity=0.9)

    Reference:
        "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019.
    """

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.5,
        smoothing: float = 0.9,
        decay: Decay = "cosine",
        update_every: int | None = None,
        stop_at: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, **options)
        checks.fraction("The paper's value is 0.9.", below_1=True, smoothing=smoothing)
        self.smoothing = smoothing

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: all."""
        return dict.fromkeys(self._weights, 1.0)

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Begin the average at 0."""
        dtype = torch.promote_types(weight.W.dtype, torch.float32)
        return {"momentum": torch.zeros_like(weight.mask, dtype=dtype)}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """Average the gradients of all steps but those that AMP skips."""
        if finite(weights):
            for weight in weights:
                momentum = weight.buffers["momentum"]
                momentum.lerp_(weight.dP.to(momentum.dtype) / scale, 1 - self.smoothing)

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop each layer's smallest ``|W|``, share them out by mean momentum, grow where ``|momentum|`` is largest."""
        drops = self.to_drop(weights, [share(fraction, weight.active) for weight in weights])
        grows = self.to_grow(weights, drops, [contribution(w.buffers["momentum"], w.mask) for w in weights])
        for weight, fewer, more in zip(weights, drops, grows, strict=True):
            grown = select.top_k_positions(weight.buffers["momentum"].abs(), more, among=~weight.mask)
            weight.exchange(weight.smallest(fewer), grown)


def contribution(momentum: Tensor, mask: Tensor) -> float:
    """Return the mean ``|momentum|`` over active weights; 0 if there are none.

    >>> contribution(torch.tensor([1.0, -3.0, 8.0]), torch.tensor([True, True, False]))
    2.0
    """
    active = momentum[mask]
    return float(active.abs().mean()) if len(active) else 0.0
