"""SET: sparse evolutionary training (Mocanu et al., Nature Communications 2018).

Section "Methods" of the paper. Decisions: the update runs at the first step of an epoch, which is where the one before
ended; connections that were just dropped are not drawn again; new ones start at 0.
"""

from torch import Tensor

from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.weights.base import Weight

__all__ = ["SET"]


class SET(PruneAndGrow):
    """Sparse Evolutionary Training: drop the smallest weights of each layer, grow as many at random.

    Example:
        >>> from lightning_sparse import SET
        >>> callback = SET(sparsity=0.9, exclude=["*.head.weight"])

    Reference:
        "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
        science", Nature Communications 9 (2018).
    """

    drop_fraction: float = option(
        default=0.3, doc="the paper's zeta, share of a layer's connections that an update drops, in (0, 1]."
    )
    stop_at: float = 1.0

    paper_update_every = None

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow at random where nothing was."""
        return self.pattern.grow_at_random(weight, n, dropped, self.generator)
