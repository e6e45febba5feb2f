"""MEST: memory-economic sparse training (Yuan et al., NeurIPS 2021).

Section 3: elastic mutation (EM) and the soft memory bound (EM&S). Decisions: the mutated share falls by a cosine where
the authors' scripts lower it in two steps; the soft bound starts at the budget and returns to it, exactly, at the end
of the updates; the gradient is that of the step's own batch; connections that were just dropped are not drawn again.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import sampling
from lightning_sparse.rules.budgets import share
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Pool, Weight

__all__ = ["MEST"]


class MEST(SparseStorage, PruneAndGrow):
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
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only).
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

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
        decay: Decay = "cosine",
        update_every: int | None = None,
        stop_at: float = 0.75,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)
        checks.at_least(0, "0 looks at magnitudes alone.", gradient_weight=gradient_weight)
        self.gradient_weight = gradient_weight
        self.soft_bound = self.resizes = soft_bound
        self._above: Counter[str] = Counter()  # connections above the budget, by the layers' names

    def importance(self, weight: Weight, scale: float) -> Tensor:
        """Return ``|W| + lambda |dP|`` of the active connections."""
        assert weight.parameter is not None
        if weight.parameter.grad is None:
            return weight.magnitudes
        return weight.magnitudes + self.gradient_weight / scale * weight.slopes

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """In each layer drop the least important and grow as many at random where nothing was."""
        for weight in weights:
            n = self.to_move(weight, fraction)
            grown = sampling.free_positions(n, weight.positions, weight.size, self.generator)
            weight.exchange(weight.smallest(n, self.importance(weight, scale)), grown)

    # ------------------------------------------------------------------ the soft bound

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin with the budget."""
        super().initial_masks(weights)
        for weight in weights:
            self._above[weight.name] = 0

    @property
    def surplus(self) -> int:
        """Number of connections above the budget now."""
        return sum(self._above[name] for name in self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what is above the budgets, too."""
        return {**super().state_dict(), "above": dict(self._above)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._above = Counter(state_dict["above"])

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Update; under the soft bound drop to the budget and grow above it, also weights without gradient."""
        if not self.soft_bound:
            super().move(weights, pool, scale)
            return
        for weight in pool.weights:
            fewer, more = self._above[weight.name], self.extra(weight, pool)
            grown = sampling.free_positions(more, weight.positions, weight.size, self.generator)
            weight.exchange(weight.smallest(fewer, self.importance(weight, scale)), grown)
            self._above[weight.name] = more

    def extra(self, weight: Weight, pool: Pool) -> int:
        """Return how many connections above its budget a layer has from now on; half of the free places at most."""
        if pool.step >= self.last_step():
            return 0
        return min(share(self.fraction(pool), self.budget(weight)), (weight.size - self.budget(weight)) // 2)

    def budget(self, weight: Weight) -> int:
        """Return the number of a layer's connections, without those above it."""
        return weight.active - self._above[weight.name]

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
        if self.surplus:
            self._warn_once(
                f"MEST has {self.surplus} active weights above its budget: the training ended before "
                f"{self.stop_at:.0%} of the steps planned. Set max_epochs or max_steps to what is really trained."
            )
