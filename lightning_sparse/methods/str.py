"""STR: soft threshold weight reparameterization (Kusupati et al., ICML 2020), as the AutoSparse paper describes it.

AutoSparse with alpha = 0: inactive weights receive no gradient.
"""

from torch import Tensor

from lightning_sparse.compat.options import option
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.soft_threshold import SoftThresholded

__all__ = ["STR"]


class STR(SoftThresholded, LatentCallback):
    r"""Soft Threshold Reparameterization: a learnable soft threshold per layer, driven by weight decay.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``, and both gradients are its plain
    derivatives: ``dW = dP * 1[|W| > T]``, ``ds = -T (1 - T) sum dP sign(W) 1[|W| > T]``.

    Example:
        >>> from lightning_sparse import STR
        >>> callback = STR(init_threshold=-200, threshold_weight_decay=1e-3)
        >>> callback = STR(sparsity=0.9)

    Reference:
        "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020.
    """

    init_threshold: float | None = option(
        default=None,
        kw_only=False,
        doc="``s`` at the start. The more negative, the later sparsity sets in: weight decay brings it up. May be left "
        "out with ``sparsity``: then -200, which begins dense.",
    )

    needs_one = True
    joins = True

    def __post_init__(self) -> None:
        """Check that there is something to begin with."""
        if self.init_threshold is None and self.sparsity_target is None:
            raise ValueError("STR needs init_threshold or sparsity, got neither. Try init_threshold=-5.")
        super().__post_init__()

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: the active ones."""
        return self.layer_density

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP 1[|W| > T]`` and ``dT = -sum dP sign(W) 1[|W| > T]``."""
        weight.kernels.soft_gradient(dP, W, weight.thresholds.tau, weight.thresholds.dtau["t"], 0.0)
