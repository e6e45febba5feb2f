"""DST: dynamic sparse training with trainable masked layers (Liu et al., ICLR 2020).

Equations 1-4 and appendix A. Decisions: the mask is ``Q > 0``, as in the authors' experiments (the text has >=); the
collapse guard acts right after the optimizer step, on one layer at a time.
"""

from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.thresholds import Granularity, ThresholdBuffer, Thresholded

__all__ = ["DST"]


class DST(Thresholded, LatentCallback):
    r"""Dynamic Sparse Training: trainable magnitude thresholds, pushed up by a regulariser.

    With ``Q = |W| - t``, the layer computes with ``P = W * 1[Q > 0]``, and the loss gains
    ``alpha * sum_layers sum_i exp(-t_i)``. The derivative of the step is taken to be the long-tailed
    ``H(x) = 2 - 4|x|`` up to ``|x| = 0.4``, ``0.4`` up to 1, and 0 beyond, so that masked weights keep learning.

    Example:
        >>> from lightning_sparse import DST
        >>> callback = DST(alpha=5e-4, exclude=["*.head.weight"])

    Reference:
        "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers", ICLR 2020.
    """

    alpha: float = option(
        kw_only=False,
        check=partial(checks.at_least, 0, "Try alpha=5e-4 for a small network, 5e-6 for a deep one."),
        doc="weight of the regulariser, at least 0: the larger, the sparser. Papers' values: 5e-4 (MNIST), 1e-3 "
        "(LSTM), 5e-6 (CIFAR-10). Its effect grows with the learning rate and the number of steps.",
    )
    granularity: Granularity = "neuron"
    reset_above: float | None = 0.99
    init_threshold: float = fixed(default=0.0)

    regularised = True

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``W * 1[|W| > t]`` (Eqs. 1-2)."""
        passing: int | Tensor = weight.kernels.hard_project(W, weight.thresholds.tau, out)
        return passing

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP M + dP W H(Q) sign(W)`` and ``dt = -sum_j dP W H(Q)`` (App. A.3)."""
        weight.kernels.hard_gradient(dP, W, weight.thresholds.tau, weight.thresholds.dtau["t"])

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """Add the derivative of ``alpha sum exp(-t)`` (Eq. 4)."""
        buffer.kernels.exponential_penalty(buffer.gradients["t"], buffer.values["t"], self.alpha * share)
