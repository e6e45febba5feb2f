"""STR: soft threshold weight reparameterization (Kusupati et al., ICML 2020), as the AutoSparse paper describes it.

AutoSparse with alpha = 0: inactive weights receive no gradient.
"""

import torch
from torch import Tensor

from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.thresholds import ThresholdBuffer, Thresholded

__all__ = ["STR"]


class STR(Thresholded, LatentCallback):
    r"""Soft Threshold Reparameterization: a learnable soft threshold per layer, driven by weight decay.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``, and both gradients are its plain
    derivatives: ``dW = dP * 1[|W| > T]``, ``ds = -T (1 - T) sum dP sign(W) 1[|W| > T]``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import STR
        >>> callback = STR(init_threshold=-200)

    Reference:
        "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020.
    """

    init_threshold: float = option(
        kw_only=False,
        doc="``s`` at the start. The more negative, the later sparsity sets in: weight decay brings it up.",
    )
    reset_above: float | None = fixed(default=None)

    needs_weight_decay = True

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: the active ones."""
        return self.layer_density

    def level(self, t: Tensor) -> Tensor:
        """``T = sigmoid(s)``."""
        return torch.sigmoid(t)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - T, 0)``."""
        weight.kernels.soft_project(W, weight.thresholds.tau, out)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP 1[|W| > T]`` and ``dT = -sum dP sign(W) 1[|W| > T]``."""
        weight.kernels.soft_gradient(dP, W, weight.thresholds.tau, weight.thresholds.dtau["t"], 0.0)

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """``ds = g'(s) dT`` with ``g'(s) = T (1 - T)``; no regulariser but weight decay."""
        buffer.kernels.through_sigmoid(buffer.gradients["t"], buffer.values["t"])
