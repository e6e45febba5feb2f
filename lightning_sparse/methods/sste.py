"""S-STE: N:M sparsity from scratch, by a pruning function that is continuous (Hu, Zhu and Chen, NeurIPS 2024).

Of each group of M, the N largest are active, less the size of the largest of the others:
``P = beta sign(W) max(|W| - t, 0)``, where t is the (N+1)-th largest ``|W|`` of the group. So ``P`` has no jump where a
weight enters or leaves the set. The scale ``beta = <W, S> / <S, S>`` of each layer, with ``S`` that ``P`` without it,
makes the error ``|W - beta S|^2`` least; it is computed when training begins and stays, as in the paper. The gradient
passes straight through: ``dW = dP``. Decisions: any N:M, not only 2:4; the paper's estimate of the activations'
gradient (MVUE) and its FP8 products, which save time on hardware that has them, are left out.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.options import fixed
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.n_of_m import NOfMCallback

__all__ = ["SSTE"]


class SSTE(NOfMCallback):
    r"""Smooth Straight-Through Estimator: N:M by a soft threshold for each group, with a fixed scale for each layer.

    The layer computes with ``P = beta sign(W) max(|W| - t, 0)``, t the (N+1)-th largest ``|W|`` of every M neighbouring
    inputs, and ``dW = dP``. A group in which several share the place of t has fewer than N nonzeros.

    Example:
        >>> from lightning_sparse import SSTE
        >>> callback = SSTE("2:4")

    Reference:
        "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-Training", NeurIPS 2024.
    """

    transposable: bool = fixed(default=False)  # a threshold is one of a row
    update_every: int = fixed(default=1)  # P follows W
    scale_init: bool = fixed(default=False)  # beta scales

    def __post_init__(self) -> None:
        """Begin without scales."""
        super().__post_init__()
        self._betas: dict[str, float] = {}

    @property
    def betas(self) -> dict[str, float]:
        """The scale of each layer, by parameter name."""
        return dict(self._betas)

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """Begin without thresholds."""
        return {**super().new_buffers(latent), "t": torch.zeros_like(latent)}

    def mark(self, weight: LatentWeight, key: str, count: int) -> None:
        """Write the set, and for each weight the threshold of its group: the largest ``|W|`` outside of the set."""
        super().mark(weight, key, count)
        outside = self.scores(weight).masked_fill_(weight.buffers[key], 0)
        weight.buffers["t"] = self.pattern.maxima(weight, outside)

    def begin(self, weight: LatentWeight) -> None:
        """Settle the scale of a layer by its first values; 1 where all are 0."""
        self._betas[weight.name] = 1.0
        self.mark(weight, "A", self.pattern.capacity(weight))
        W, S = weight.matrix(weight.latent), torch.empty_like(weight.matrix(weight.latent))
        self.effective(weight, W, S)
        W, S = W.double(), S.double()
        product, square = weight.part.sums(torch.stack([(W * S).sum(), (S * S).sum()])).tolist()
        self._betas[weight.name] = product / square if square else 1.0

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``beta sign(W) max(|W| - t, 0)``."""
        t, beta = weight.matrix(weight.buffers["t"]), self._betas.get(weight.name, 1.0)
        torch.abs(W, out=out).sub_(t).clamp_(min=0).mul_(W.sign()).mul_(beta)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP``, straight through."""

    def latent(self, weight: LatentWeight, P: Tensor) -> Tensor:
        """``sign(P) (|P| / beta + t)``."""
        return P.sign() * (P.abs() / self._betas[weight.name] + weight.buffers["t"])

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the scales, too."""
        return {**super().state_dict(), "betas": dict(self._betas)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        self._betas = dict(state_dict["betas"])
        super().load_state_dict(state_dict)
