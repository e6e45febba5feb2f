"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., NeurIPS 2021).

Algorithm 1 of the paper, with the authors' program for what it leaves open. Decisions: connections that were pruned or
dropped in an update are not grown in it, so a layer regenerates no more of them than it had free places; new ones start
at 0; the gradient is that of the step's own batch, and the optimizer's update is applied as in any step.
"""

from collections.abc import Sequence
from typing import Any

from lightning_sparse.compat import checks
from lightning_sparse.families.gradual import GradualPruning
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import share
from lightning_sparse.rules.schedules import cosine
from lightning_sparse.weights.base import Pool, Weight

__all__ = ["GraNet"]


class GraNet(GradualPruning):
    """Gradual pruning with regrowth: fall to the target by global magnitude, and rewire some of each layer meanwhile.

    Args:
        sparsity: share of zeros at the end over all selected weights, s_f, in [0, 1).
        initial_sparsity: share of zeros at the start, s_i, from 0 (dense to sparse) to ``sparsity``.
        drop_fraction: the paper's r, share of a layer's connections that the first update regenerates, in (0, 1]; it
            falls to 0 by a cosine until the end of the training.
        begin_at: share of the training after which pruning begins, in [0, 1).
        end_at: share of the training after which the target is reached, above ``begin_at`` and at most 1; regeneration
            goes on.
        update_every: number of optimizer steps from update to update.
        options: ``distribution`` of the initial mask, ``min_layer_density``, ``seed``, ``include``, ``exclude``,
            ``log_every_n_steps``; see :class:`~lightning_sparse.families.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import GraNet
        >>> callback = GraNet(sparsity=0.9, initial_sparsity=0.5)

    Reference:
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021.
    """

    dense_gradient_to_move = True

    def __init__(
        self,
        sparsity: float,
        initial_sparsity: float = 0.5,
        drop_fraction: float = 0.5,
        begin_at: float = 0.0,
        end_at: float = 0.5,
        update_every: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, initial_sparsity, begin_at, end_at, update_every, **options)
        remedy = "The paper's value is 0.5; the method without regeneration is GMP."
        checks.fraction(remedy, above_0=True, drop_fraction=drop_fraction)
        self.drop_fraction = drop_fraction

    def is_due(self, pool: Pool) -> bool:
        """Regenerate also after the schedule's end."""
        first, last = self.span()
        return super().is_due(pool) or (pool.step > last and (pool.step - first) % self.update_every == 0)

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Prune to the schedule; then drop the smallest ``|W|`` of each layer and grow the largest ``|dP|``."""
        trained = pool.step > 0  # what has not been trained is not judged
        fraction = self.drop_fraction * cosine(pool.step / self.total_steps) if trained else 0.0
        free = [weight.steepest(min(share(fraction, weight.active), weight.room)) for weight in weights]
        self.prune(pool)
        for weight, (found, slopes) in zip(weights, free, strict=True):  # what has just been pruned does not come back
            n = min(share(fraction, weight.active), len(found))
            weight.exchange(weight.smallest(n), found[select.top_k_positions(slopes, n)])
