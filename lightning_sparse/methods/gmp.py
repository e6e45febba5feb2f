"""GMP: gradual magnitude pruning (Zhu & Gupta, 2017).

Equation 1. Decisions: one threshold for all layers by default, as is usual today; ``scope="layer"`` is the paper's. The
last update falls on the end of the schedule exactly, and pruned weights never come back.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lightning_sparse.compat import checks
from lightning_sparse.families.gradual import GradualPruning
from lightning_sparse.rules.budgets import Distribution, Scope
from lightning_sparse.weights.base import Pool, Weight

__all__ = ["GMP"]


class GMP(GradualPruning):
    """Gradual Magnitude Pruning: from dense to sparse, the smallest weights first.

    The sparsity of step t is ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3``.

    Args:
        sparsity: share of zeros at the end over all selected weights, s_f, in [0, 1).
        scope: compare the weights of all layers (``"global"``), or prune each ``"layer"`` towards its own count, given
            by ``distribution``.
        begin_at: share of the training after which pruning begins (t_0), in [0, 1).
        end_at: share of the training after which the target is reached (t_1), above ``begin_at`` and at most 1.
        update_every: number of optimizer steps from update to update.
        initial_sparsity: share of zeros at the start, s_i, from 0 to ``sparsity``; a random mask if above 0.
        distribution: how the active weights are divided among layers, see
            :class:`~lightning_sparse.families.masked.MaskedCallback`.
        options: ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see there.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import GMP
        >>> callback = GMP(sparsity=0.9, begin_at=0.1, end_at=0.7)

    Reference:
        "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    def __init__(
        self,
        sparsity: float,
        scope: Scope = "global",
        begin_at: float = 0.0,
        end_at: float = 0.75,
        update_every: int = 100,
        initial_sparsity: float = 0.0,
        distribution: Distribution | Mapping[str, float] = "uniform",
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity, initial_sparsity, begin_at, end_at, update_every, distribution=distribution, **options
        )
        checks.one_of(get_args(Scope), scope=scope)
        self.scope = scope

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Keep as many of the largest ``|W|`` as the schedule says."""
        self.prune(pool, self.scope)
