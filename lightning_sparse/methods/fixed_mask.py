"""FixedMask: train a sparse network on, and keep its zeros.

Sparse fine-tuning as usual after any pruning. Decision: a second fit of the same callback takes the zeros anew, so a
network may be pruned further in between.
"""

from lightning_sparse.compat.options import option
from lightning_sparse.families.common import SPARSITY
from lightning_sparse.families.masked import MaskedCallback

__all__ = ["FixedMask"]


class FixedMask(MaskedCallback):
    """Train a sparse network further with a fixed mask: by default its zeros stay, and no new ones are made.

    Example:
        >>> from lightning_sparse import FixedMask
        >>> callback = FixedMask()

    Reference:
        "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, Sec. 3: retraining.
    """

    sparsity_target: float | None = option(
        alias="sparsity", default=None, kw_only=False, doc=f"{SPARSITY[:-1]}; None: that of the network or file."
    )
    initial: str = "zeros"

    moves = False

    def continues(self, active: int, nonzero: int) -> bool:
        """Go on with connections of an earlier fit unless some are among the zeros now, which are to be kept."""
        return self.initial != "zeros" or active == nonzero
