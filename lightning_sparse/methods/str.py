"""STR: soft threshold weight reparameterization (Kusupati et al., ICML 2020), as the AutoSparse paper describes it.

AutoSparse with alpha = 0: inactive weights receive no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import Granularity, LatentCallback, LatentWeight, Pool

__all__ = ["STR"]


class STR(LatentCallback):
    r"""Soft Threshold Reparameterization: a learnable soft threshold per layer, driven by weight decay.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``, and both gradients are its plain
    derivatives: ``dW = dP * 1[|W| > T]``, ``ds = -T (1 - T) sum dP sign(W) 1[|W| > T]``.

    Args:
        init_threshold: ``s`` at the start. The more negative, the later sparsity sets in: weight decay brings it up.
        granularity: one threshold per ``"layer"`` (the paper's), per output ``"neuron"`` (filter) or per ``"weight"``.
        include: glob patterns on names of the weights to make sparse; see :class:`~lightning_sparse.SparseCallback`.
        exclude: glob patterns on names of weights that stay dense.
        log_every_n_steps: log also every so many optimizer steps; otherwise once an epoch.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import STR
        >>> callback = STR(init_threshold=-200)

    Reference:
        "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020.
    """

    needs_weight_decay = True

    def __init__(
        self,
        init_threshold: float,
        granularity: Granularity = "layer",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        checks.finite("Try -5, or -200 to begin dense.", init_threshold=init_threshold)
        super().__init__(init_threshold, granularity, include, exclude, log_every_n_steps)

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: the active ones."""
        return self.layer_density

    def level(self, t: Tensor) -> Tensor:
        """``T = sigmoid(s)``."""
        return torch.sigmoid(t)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - T, 0)``."""
        weight.kernels.soft_project(W, weight.tau, out)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP 1[|W| > T]`` and ``dT = -sum dP sign(W) 1[|W| > T]``."""
        weight.kernels.soft_gradient(dP, W, weight.tau, weight.dtau["t"], 0.0)

    def threshold_gradients(self, pool: Pool, share: float) -> bool:
        """``ds = g'(s) dT`` with ``g'(s) = T (1 - T)``; no regulariser but weight decay."""
        pool.kernels.through_sigmoid(pool.gradients["t"], pool.values["t"])
        return False
