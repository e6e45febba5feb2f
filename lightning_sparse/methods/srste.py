"""SR-STE: N:M sparsity from scratch, by a sparse-refined straight-through estimator (Zhou et al., ICLR 2021).

The layers compute with ``P``, the N largest ``|W|`` of every M. The gradient passes straight through to all of ``W``,
and a decay acts on what is pruned: ``W <- W - lr (dP + lambda_w (1 - A) W)``. It keeps weights from going in and out of
the set; with ``lambda_w = 0`` the method is the plain straight-through estimator. Decisions: the decay is added to the
gradient, as in the authors' program, so momentum and Adam's scale apply to it; equals within a group win evenly over
the inputs, not the first ones. ``transposable``: Hubara et al. (NeurIPS 2021), Hu et al. (ICML 2024).
"""

from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.n_of_m import NOfMCallback

__all__ = ["SRSTE"]


class SRSTE(NOfMCallback):
    r"""Sparse-Refined Straight-Through Estimator: N:M from scratch, with a decay of what is pruned.

    With A the N largest ``|W|`` of every M neighbouring inputs, the layer computes with ``P = W * 1_A``, and
    ``dW = dP + lambda_w W`` outside of A, ``dP`` in it.

    Example:
        >>> from lightning_sparse import SRSTE
        >>> callback = SRSTE("2:4")

    Reference:
        "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    lambda_w: float = option(
        default=2e-4,
        check=partial(checks.at_least, 0, "The authors' value is 2e-4; 0 is the plain straight-through estimator."),
        doc="weight of the decay of pruned weights, at least 0.",
    )

    joins = True

    def __post_init__(self) -> None:
        """Begin with the whole decay."""
        super().__post_init__()
        self._decay = self.lambda_w

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102  (inherited)
        self._decay = self.lambda_w * share * scale
        super().before_step(optimizer, share, scale)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP + lambda_w (1 - A) W``."""
        if self._decay:
            dP.add_(W.masked_fill(weight.matrix(weight.buffers["A"]), 0), alpha=self._decay)
