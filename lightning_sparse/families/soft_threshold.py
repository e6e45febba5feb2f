"""SoftThresholded: the function and the derivatives that STR and AutoSparse share."""

import math

import torch
from torch import Tensor

from lightning_sparse.compat.options import fixed
from lightning_sparse.families.target import Number
from lightning_sparse.families.thresholds import ThresholdBuffer, Thresholded
from lightning_sparse.rules.matrices import write_matrix
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["SoftThresholded"]

#: ``s`` at the start of a training that begins dense: ``T`` is 0 in all dtypes but float64
DENSE = -200.0


class SoftThresholded(Thresholded):
    """``P = sign(W) max(|W| - T, 0)`` with ``T = sigmoid(s)``; weight decay on ``s``, or a target, drives sparsity."""

    reset_above: float | None = fixed(default=None)

    instead_of_sparsity = "init_threshold"
    needs_weight_decay = True

    @property
    def first_threshold(self) -> float:
        """``s`` at the start: with a target, that of a dense network unless it is given."""
        if self.init_threshold is not None:
            return self.init_threshold
        return -5.0 if self.sparsity_target is None else DENSE

    def level(self, t: Number) -> Number:
        """``T = sigmoid(s)``."""
        if isinstance(t, Tensor):
            return torch.sigmoid(t)
        e = math.exp(-abs(t))
        return (1.0 if t > 0 else e) / (1 + e)

    def margins(self, magnitudes: Tensor, t: Number) -> Tensor:
        """``logit(|W|) - s``: thresholds are shifted in their own unit. NaN above 1, which no threshold reaches."""
        return torch.logit(magnitudes) - t

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - T, 0)``; with a target, survivors shrink by less and less of ``T``."""
        weight.kernels.soft_project(W, weight.thresholds.tau, out, weight.thresholds.shrinkage)

    def latent(self, weight: LatentWeight, P: Tensor) -> Tensor:
        """``P + sign(P) T``, which shrinks to ``P``; a weight whose mask is frozen does not shrink."""
        if weight.frozen is not None:
            return P
        W = torch.empty_like(weight.latent).copy_(P)
        rows = weight.matrix(W)
        rows.addcmul_(rows.sign(), weight.thresholds.tau.to(rows.dtype), value=weight.thresholds.shrinkage)
        write_matrix(W, rows, weight.outputs)
        return W

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """``ds = g'(s) dT`` with ``g'(s) = T (1 - T)``; no regulariser but weight decay."""
        buffer.kernels.through_sigmoid(buffer.gradients["t"], buffer.values["t"])
