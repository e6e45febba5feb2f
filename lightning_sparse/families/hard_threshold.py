"""HardThresholded: what DST and DFBST share: weights above their threshold as they are, and a regulariser."""

from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.thresholds import Granularity, ThresholdBuffer, Thresholded
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["HardThresholded"]


class HardThresholded(Thresholded):
    """``P = W * 1[|W| > tau]``; thresholds are pushed up by ``alpha sum exp(-t)``, or follow a plan."""

    alpha: float | None = option(
        default=None,
        kw_only=False,
        check=partial(checks.at_least, 0, "Try alpha=5e-4 for a small network, 5e-6 for a deep one."),
        doc="weight of the regulariser, at least 0: the larger, the sparser. Papers' values: 5e-4 (MNIST), 1e-3 "
        "(LSTM), 5e-6 (CIFAR-10). Its effect grows with the learning rate and the number of steps. Give either it or "
        "``sparsity``.",
    )
    granularity: Granularity = "neuron"
    init_threshold: float = fixed(default=0.0)

    regularised = True
    instead_of_sparsity = "alpha"
    needs_one = True

    def __post_init__(self) -> None:
        """Check that there is one thing that drives sparsity."""
        super().__post_init__()
        if (self.alpha is None) == (self.sparsity_target is None):
            raise ValueError(
                f"{type(self).__name__} takes either alpha or sparsity, got alpha={self.alpha!r} and "
                f"sparsity={self.sparsity_target!r}. Give sparsity=0.9 for 10 % of the weights (and alpha=None where a "
                "recipe has one), or alpha=5e-4 to let the regulariser find the sparsity."
            )

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``W * 1[|W| > tau]``."""
        passing: int | Tensor = weight.kernels.hard_project(W, weight.thresholds.tau, out)
        return passing

    def penalise(self, buffer: ThresholdBuffer, share: float) -> None:
        """Add ``share`` times the derivative of ``alpha sum exp(-t)``, unless thresholds follow a plan."""
        if self.alpha is not None:
            buffer.kernels.exponential_penalty(buffer.gradients["t"], buffer.values["t"], self.alpha * share)
