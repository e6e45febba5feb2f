"""MEST: memory-economic sparse training (Yuan et al., NeurIPS 2021).

Section 3: elastic mutation (EM) and the soft memory bound (EM&S). Decisions: the mutated share falls by a cosine where
the authors' scripts lower it in two steps; the soft bound starts at the budget and returns to it, exactly, at the end
of the updates; the gradient is that of the step's own batch; connections that were just dropped are not drawn again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import checks, masks
from lightning_sparse.distributions import share
from lightning_sparse.masked import MaskedWeight, Pool
from lightning_sparse.prune_and_grow import PruneAndGrow

__all__ = ["MEST"]


class MEST(PruneAndGrow):
    """Memory-Economic Sparse Training: drop the smallest ``|W| + lambda |dP|`` of each layer, grow at random.

    With ``soft_bound`` new connections come before old ones go: between two updates a layer has up to
    ``drop_fraction`` more connections than its budget, and the next update drops as many, old or new, by importance.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1); with ``soft_bound`` that of the end.
        drop_fraction: share of a layer's connections that the first update moves, in (0, 1].
        gradient_weight: lambda, at least 0.
        soft_bound: grow first and drop at the next update (the paper's EM&S).
        decay: how ``drop_fraction`` falls until the end of the updates: ``"cosine"``, ``"linear"``, ``"none"``.
        update_every: number of optimizer steps from update to update; None: at the first step of each epoch but the
            first.
        stop_at: share of the training after which connections stay, in (0, 1].
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import MEST
        >>> callback = MEST(sparsity=0.9, soft_bound=True)

    Reference:
        "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021.
    """

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.3,
        gradient_weight: float = 0.5,
        soft_bound: bool = False,
        decay: str = "cosine",
        update_every: int | None = None,
        stop_at: float = 0.75,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, **options)
        checks.at_least(0, "0 looks at magnitudes alone.", gradient_weight=gradient_weight)
        self.gradient_weight = gradient_weight
        self.soft_bound = soft_bound

    def importance(self, weight: MaskedWeight, scale: float) -> Tensor:
        """Return ``|W| + lambda |dP|``."""
        assert weight.parameter is not None
        if weight.parameter.grad is None:
            return weight.W.abs()
        return weight.W.abs() + self.gradient_weight / scale * weight.dP.abs()

    def update(self, weights: Sequence[MaskedWeight], fraction: float, scale: float) -> None:
        """In each layer drop the least important and grow as many at random where nothing was."""
        for weight in weights:
            n = self.to_move(weight, fraction)
            dropped = masks.lowest(self.importance(weight, scale), n, among=weight.mask)
            grown = masks.random(~weight.mask, n, self.generator)
            weight.change(dropped, grown)

    # ------------------------------------------------------------------ the soft bound

    def new_buffers(self, weight: MaskedWeight) -> dict[str, Tensor]:
        """Keep the connections above the budget: none at first."""
        return {"extra": torch.zeros_like(weight.mask)} if self.soft_bound else {}

    def move(self, weights: Sequence[MaskedWeight], pool: Pool, scale: float) -> None:
        """Update; under the soft bound drop to the budget and grow above it, also weights without gradient."""
        if not self.soft_bound:
            super().move(weights, pool, scale)
            return
        for weight in pool.weights:
            more = self.extra(weight, pool)
            dropped = masks.lowest(self.importance(weight, scale), masks.count(weight.buffers["extra"]), weight.mask)
            grown = masks.random(~weight.mask, more, self.generator)
            weight.change(dropped, grown)
            weight.buffers["extra"] = grown

    def extra(self, weight: MaskedWeight, pool: Pool) -> int:
        """Return how many connections above its budget a layer has from now on; half of the free places at most."""
        if pool.step >= self.last_step():
            return 0
        return min(share(self.fraction(pool), self.budget(weight)), (weight.size - self.budget(weight)) // 2)

    def budget(self, weight: MaskedWeight) -> int:
        """Return the number of a layer's connections, without those above it."""
        return weight.active - masks.count(weight.buffers["extra"])

    def asked(self, pool: Pool) -> int | None:
        """Return the budget and what is above it now."""
        if not self.soft_bound:
            return None
        return sum(self.budget(weight) + self.extra(weight, pool) for weight in pool.weights)

    def last_step(self) -> int:
        """Return the step at which the soft bound ends."""
        return min(math.ceil(self.stop_at * self.total_steps), int(self.total_steps) - 1)

    def is_due(self, pool: Pool) -> bool:
        """Update a last time where the soft bound ends."""
        return super().is_due(pool) or (self.soft_bound and pool.step == self.last_step())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before the soft bound did."""
        above = sum(masks.count(weight.buffers["extra"]) for weight in self._weights.values()) if self.soft_bound else 0
        if above:
            self._warn_once(
                f"MEST has {above} active weights above its budget: the training ended before {self.stop_at:.0%} of "
                "the steps planned. Set max_epochs or max_steps to what is really trained."
            )
