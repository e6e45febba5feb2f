"""SNIP: single-shot network pruning based on connection sensitivity (Lee et al., ICLR 2019).

Algorithm 1. The sensitivity to a connection's switch ``c`` at ``c = 1`` is ``dL/dc = dP * W``; the paper's
division by the sum of all sensitivities does not change their order.
"""

from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.probe import Probe, whole

__all__ = ["SNIP"]


class SNIP(BeforeTraining):
    """Keep the connections whose removal would change the loss most: the largest ``|dP * W|`` of the whole network.

    ``dP`` is the gradient of the mean loss of some batches, at the initial weights.

    Example:
        >>> from lightning_sparse import SNIP
        >>> callback = SNIP(sparsity=0.95)

    Reference:
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.
    """

    batches: int = option(
        default=1,
        check=partial(checks.integer, 1, "The paper's value is 1."),
        doc="number of training batches (of each process) whose loss is differentiated, 1 or more.",
    )

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``|dP * W|``."""
        return [(dP * whole(W)).abs() for dP, W in zip(probe.gradient(self.batches), probe.weights, strict=True)]
