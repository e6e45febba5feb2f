"""AutoSparse: learnable soft thresholds with gradient annealing (ICLR 2023 submission).

Equations 1-9. Decisions: alpha is annealed over the Trainer's epochs; the set B of the explicit gradient sparsity is
found anew at every step, per layer, and never smaller than the active set A.
"""

from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.annealing import Annealed
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.soft_threshold import SoftThresholded
from lightning_sparse.rules.schedules import Annealing
from lightning_sparse.rules.select import largest_or_above

__all__ = ["AutoSparse"]


class AutoSparse(Annealed, SoftThresholded, LatentCallback):
    r"""AutoSparse: a learnable soft threshold per layer, with annealed gradients for the weights below it.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``. Backward, ``dW = dP * A`` and
    ``ds = -T (1 - T) sum dP sign(W) A``, where ``A`` is 1 for active weights and ``alpha_i`` for the others;
    ``alpha_i = alpha * decay(i)`` in epoch i. The optimizer's weight decay on ``s`` is what drives sparsity.

    Raises:
        MisconfigurationException: at fit start, if the decay needs the number of epochs and nothing bounds it.

    Example:
        >>> from lightning_sparse import AutoSparse
        >>> callback = AutoSparse(alpha=0.75, alpha_zero_epoch=90)

    Reference:
        "AutoSparse: Towards Automated Sparse Training", ICLR 2023 submission, Eqs. 1-9.
    """

    alpha: float = option(
        default=0.75,
        kw_only=False,
        check=partial(checks.fraction, "The paper's values are 0.75 to 1; 0 makes it STR."),
        doc="gradient scale of inactive weights at the start, from 0 (STR) to 1. Paper's values: 0.75 to 1; 0.4.",
    )
    decay: Annealing = "sigmoid_cosine"
    alpha_zero_epoch: int | None = option(
        default=None,
        check=partial(checks.integer, 0, "None keeps annealing to the end."),
        doc="alpha is 0 from this epoch (counted from 0) on, so that gradients are as sparse as weights.",
    )
    init_threshold: float | None = option(
        default=None,
        doc="``s`` at the start; default: -5, with ``sparsity`` -200, which begins dense. Paper's values: -5; -7 for "
        "the Transformer.",
    )
    backward_density: float | None = option(
        default=None,
        check=partial(checks.fraction, "None computes every weight's gradient."),
        doc="compute weight gradients for this share of each layer only, its largest ``|W|`` (and always for the "
        "active ones); None: for all. Costs a selection of the k-th largest weight per layer and step.",
    )

    joins = True

    def __post_init__(self) -> None:
        """Have weights computed with one by one if those with a gradient are chosen layer by layer."""
        super().__post_init__()
        self.joins = self.backward_density is None

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: B, all, or once alpha is 0, the active ones."""
        if self.current_alpha == 0:
            return self.layer_density
        share = 1.0 if self.backward_density is None else self.backward_density
        dense = {name: share for name, weight in self._weights.items() if weight.frozen is None}
        return {name: max(dense.get(name, 0.0), density) for name, density in self.layer_density.items()}

    @property
    def needs_whole_weights(self) -> str | None:
        """None, unless the weights with a gradient are chosen, which is done with whole layers."""
        if self.backward_density is not None:
            return "Leave backward_density out, or use strategy='ddp'."
        return super().needs_whole_weights

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Anneal alpha (Eqs. 2-4, 9)."""
        if self.alpha_zero_epoch is not None and epoch >= self.alpha_zero_epoch:
            self.current_alpha = 0.0
        else:
            super().begin_epoch(epoch, epochs)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP A`` and ``dT = -sum dP sign(W) A`` (Eq. 1), outside of B nothing (Eq. 8)."""
        t = weight.thresholds
        if self.backward_density is not None:
            dP.mul_(largest_or_above(W.abs(), t.tau, self.backward_density))
        weight.kernels.soft_gradient(dP, W, t.tau, t.dtau["t"], self.current_alpha)
