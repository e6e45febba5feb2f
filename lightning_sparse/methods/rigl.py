"""RigL: rigging the lottery (Evci et al., ICML 2020).

Algorithm 1. Decisions: connections that were just dropped are not grown again, so a layer moves no more of them than it
has free places; new ones start at 0; the gradient is that of the step's own batch (or accumulated batches), averaged
over processes.
"""

from torch import Tensor

from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.weights.base import Weight

__all__ = ["RigL"]


class RigL(PruneAndGrow):
    """Rigged Lottery: drop the smallest weights of each layer, grow where the dense gradient is largest.

    The step that moves connections applies no optimizer update. With ``storage="sparse"`` it computes the gradient of
    some rows at a time.

    Example:
        >>> from lightning_sparse import RigL
        >>> callback = RigL(sparsity=0.9, distribution="erk")

    Reference:
        "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """

    drop_fraction: float = option(
        default=0.3,
        doc="the paper's alpha, share of a layer's connections that the first update drops, in (0, 1].",
    )

    skips_update = True
    dense_gradient_to_move = True

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow the largest ``|dP|`` where nothing was."""
        return self.pattern.grow_by_gradient(weight, n, dropped)
