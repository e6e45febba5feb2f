"""DST: dynamic sparse training with trainable masked layers (Liu et al., ICLR 2020).

Equations 1-4 and appendix A. Decisions: the mask is ``Q > 0``, as in the authors' experiments (the text has >=); the
collapse guard acts right after the optimizer step, on one layer at a time.
"""

from torch import Tensor

from lightning_sparse.families.hard_threshold import HardThresholded
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.thresholds import ThresholdBuffer

__all__ = ["DST"]


class DST(HardThresholded, LatentCallback):
    r"""Dynamic Sparse Training: trainable magnitude thresholds, pushed up by a regulariser.

    With ``Q = |W| - t``, the layer computes with ``P = W * 1[Q > 0]``, and ``alpha * sum_layers sum_i exp(-t_i)`` is
    added to the loss. ``H`` replaces the derivative of the step: ``H(x) = 2 - 4|x|`` up to ``|x| = 0.4``, ``0.4`` up to
    1, and 0 beyond, so that masked weights keep learning. With ``sparsity`` instead of ``alpha``, there is no
    regulariser and all thresholds are shifted together to meet it.

    Example:
        >>> from lightning_sparse import DST
        >>> callback = DST(alpha=5e-4, exclude=["*.head.weight"])
        >>> callback = DST(sparsity=0.9)

    Reference:
        "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers", ICLR 2020.
    """

    joins = True

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP M + dP W H(Q) sign(W)`` and ``dt = -sum_j dP W H(Q)`` (App. A.3)."""
        weight.kernels.hard_gradient(dP, W, weight.thresholds.tau, weight.thresholds.dtau["t"])

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """Add the derivative of ``alpha sum exp(-t)`` (Eq. 4)."""
        self.penalise(buffer, share)
