"""DST: dynamic sparse training with trainable masked layers (Liu et al., ICLR 2020).

Equations 1-4 and appendix A. Decisions: the mask is ``Q > 0``, as in the authors' experiments (the text has >=); the
collapse guard acts right after the optimizer step, on one layer at a time.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import Granularity, LatentCallback, LatentWeight, Pool

__all__ = ["DST"]


class DST(LatentCallback):
    r"""Dynamic Sparse Training: trainable magnitude thresholds, pushed up by a regulariser.

    With ``Q = |W| - t``, the layer computes with ``P = W * 1[Q > 0]``, and the loss gains
    ``alpha * sum_layers sum_i exp(-t_i)``. The derivative of the step is taken to be the long-tailed
    ``H(x) = 2 - 4|x|`` up to ``|x| = 0.4``, ``0.4`` up to 1, and 0 beyond, so that masked weights keep learning.

    Args:
        alpha: weight of the regulariser, at least 0: the larger, the sparser. Papers' values: 5e-4 (MNIST), 1e-3
            (LSTM), 5e-6 (CIFAR-10). Its effect grows with the learning rate and the number of steps.
        granularity: one threshold per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``.
        reset_above: collapse guard: a layer with more than this share masked has its thresholds set to 0; None
            switches the guard off, as the paper does for LSTMs.
        include: glob patterns on names of the weights to make sparse; see :class:`~lightning_sparse.SparseCallback`.
        exclude: glob patterns on names of weights that stay dense.
        log_every_n_steps: log also every so many optimizer steps; otherwise once an epoch.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import DST
        >>> callback = DST(alpha=5e-4, exclude=["*.head.weight"])

    Reference:
        "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers", ICLR 2020.
    """

    def __init__(
        self,
        alpha: float,
        granularity: Granularity = "neuron",
        reset_above: float | None = 0.99,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(0.0, granularity, include, exclude, log_every_n_steps)
        checks.at_least(0, "Try alpha=5e-4 for a small network, 5e-6 for a deep one.", alpha=alpha)
        if reset_above is not None:
            checks.fraction("The paper's value is 0.99; None switches the guard off.", reset_above=reset_above)
        self.alpha = alpha
        self.reset_above = reset_above

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``W * 1[|W| > t]`` (Eqs. 1-2)."""
        passing: int | Tensor = weight.kernels.hard_project(W, weight.tau, out)
        return passing

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP M + dP W H(Q) sign(W)`` and ``dt = -sum_j dP W H(Q)`` (App. A.3)."""
        weight.kernels.hard_gradient(dP, W, weight.tau, weight.dtau["t"])

    def threshold_gradients(self, pool: Pool, share: float) -> bool:
        """Add the derivative of ``alpha sum exp(-t)`` (Eq. 4)."""
        pool.kernels.exponential_penalty(pool.gradients["t"], pool.values["t"], self.alpha * share)
        return True
