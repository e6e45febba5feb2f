"""AutoSparse: learnable soft thresholds with gradient annealing (ICLR 2023 submission).

Equations 1-9; the forward function and the thresholds' own gradients are STR's. Decisions: alpha is annealed over the
Trainer's epochs; the set B of the explicit gradient sparsity is found anew at every step, per layer, and never smaller
than the active set A.
"""

import math
from functools import partial

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.annealing import Annealed
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.thresholds import ThresholdBuffer, Thresholded
from lightning_sparse.rules.schedules import Annealing
from lightning_sparse.rules.select import top_k

__all__ = ["AutoSparse"]


class AutoSparse(Annealed, Thresholded, LatentCallback):
    r"""AutoSparse: a learnable soft threshold per layer, with annealed gradients for the weights below it.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``. Backward, ``dW = dP * A`` and
    ``ds = -T (1 - T) sum dP sign(W) A``, where ``A`` is 1 for active weights and ``alpha_i`` for the others;
    ``alpha_i = alpha * decay(i)`` in epoch i. The optimizer's weight decay on ``s`` is what drives sparsity.

    Raises:
        ValueError: an argument is out of range.
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
    init_threshold: float = option(default=-5.0, doc="``s`` at the start. Paper's values: -5; -7 for the Transformer.")
    backward_density: float | None = option(
        default=None,
        check=partial(checks.fraction, "None computes every weight's gradient."),
        doc="compute weight gradients for this share of each layer only, its largest ``|W|`` (and always for the "
        "active ones); None: for all. Costs a selection of the k-th largest weight per layer and step.",
    )
    reset_above: float | None = fixed(default=None)

    needs_weight_decay = True

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: B, all, or once alpha is 0, the active ones."""
        if self.current_alpha == 0:
            return self.layer_density
        if self.backward_density is None:
            return dict.fromkeys(self._weights, 1.0)
        return {name: max(self.backward_density, density) for name, density in self.layer_density.items()}

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Anneal alpha (Eqs. 2-4, 9)."""
        if self.alpha_zero_epoch is not None and epoch >= self.alpha_zero_epoch:
            self.current_alpha = 0.0
            return
        super().begin_epoch(epoch, epochs)

    def level(self, t: Tensor) -> Tensor:
        """``T = sigmoid(s)``."""
        return torch.sigmoid(t)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - T, 0)``."""
        weight.kernels.soft_project(W, weight.thresholds.tau, out)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP A`` and ``dT = -sum dP sign(W) A`` (Eq. 1), outside of B nothing (Eq. 8)."""
        t = weight.thresholds
        if self.backward_density is not None:
            dP.mul_(_largest(W.abs(), t.tau, self.backward_density))
        weight.kernels.soft_gradient(dP, W, t.tau, t.dtau["t"], self.current_alpha)

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """``ds = g'(s) dT`` with ``g'(s) = T (1 - T)``; no regulariser but weight decay."""
        buffer.kernels.through_sigmoid(buffer.gradients["t"], buffer.values["t"])


def _largest(magnitude: Tensor, T: Tensor, density: float) -> Tensor:
    """Return B: the share ``density`` of largest magnitudes, at least all above ``T``."""
    active = magnitude > T
    k = round(density * magnitude.numel())
    return active if int(active.sum()) >= k else top_k(magnitude.masked_fill_(active, math.inf), k)
