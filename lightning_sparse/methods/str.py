"""STR: soft threshold weight reparameterization (Kusupati et al., ICML 2020), as the AutoSparse paper describes it.

AutoSparse with alpha = 0: inactive weights receive no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse import checks, kernels
from lightning_sparse.latent import Granularity, LatentCallback, LatentWeight

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
        checks.at_least(float("-inf"), "Try -5, or -200 to begin dense.", init_threshold=init_threshold)
        super().__init__(init_threshold, granularity, include, exclude, log_every_n_steps)

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: the active ones."""
        return self.layer_density

    def effective(self, W: Tensor, t: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - sigmoid(s), 0)``."""
        T = torch.sigmoid(t)
        kernels.for_tensors(W, T).soft_project(W, T, out)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor, t: Tensor) -> Tensor:
        """``dW = dP 1[|W| > T]`` and ``ds = -g'(s) sum dP sign(W) 1[|W| > T]``."""
        T = torch.sigmoid(t)
        dT: Tensor = kernels.for_tensors(dP, T).soft_gradient(dP, W, T, 0.0)
        return dT * T * (1 - T)
