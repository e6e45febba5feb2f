"""GMP: gradual magnitude pruning (Zhu & Gupta, 2017).

Equation 1. Decisions: one threshold for all layers by default, as is usual today; ``scope="layer"`` is the paper's. The
last update falls on the end of the schedule exactly, and pruned weights never come back.
"""

from collections.abc import Mapping, Sequence

from lightning_sparse.families.gradual import GradualPruning
from lightning_sparse.rules.budgets import Distribution
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["GMP"]


class GMP(GradualPruning):
    """Gradual Magnitude Pruning: from dense to sparse, the smallest weights first.

    The sparsity of step t is ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3``.

    Example:
        >>> from lightning_sparse import GMP
        >>> callback = GMP(sparsity=0.9, begin_at=0.1, end_at=0.7)

    Reference:
        "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    distribution: Distribution | Mapping[str, float] = "uniform"

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Keep as many of the largest ``|W|`` as the schedule says."""
        self.prune(group)
