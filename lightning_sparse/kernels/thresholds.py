"""The arithmetic of thresholds, in the code that suits the tensors best."""

from typing import Protocol

from torch import Tensor

from lightning_sparse.kernels import dispatch, thresholds_torch

__all__ = ["ThresholdKernels", "for_tensors"]


class ThresholdKernels(Protocol):
    """What methods with thresholds compute: the functions of ``thresholds_torch``, where they are described.

    Matrices are ``(out, n)``, ``tau`` is ``(out, 1)`` or ``(out, n)``, ``t`` and ``dt`` are vectors.
    """

    def hard_project(self, W: Tensor, tau: Tensor, out: Tensor) -> int | Tensor:
        """Write ``W * 1[|W| > tau]``; return how many weights pass."""

    def hard_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
        """Turn the gradient of what ``hard_project`` wrote into those of ``W`` and ``tau``."""

    def soft_project(self, W: Tensor, tau: Tensor, out: Tensor) -> None:
        """Write ``sign(W) max(|W| - tau, 0)``."""

    def soft_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
        """Turn the gradient of what ``soft_project`` wrote into those of ``W`` and ``tau``."""

    def backward_mask(
        self, G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor
    ) -> None:
        """Mask a gradient by contribution scores."""

    def near(self, W: Tensor, low: Tensor, high: Tensor, t: Tensor) -> tuple[int, Tensor, Tensor]:
        """Return how many magnitudes are above ``high``, and those from ``low`` up to it beside their ``t``."""

    def add_rows(self, x: Tensor, out: Tensor) -> None:
        """Write the sum of ``x (out, 1)``."""

    def through_abs(self, dt: Tensor, t: Tensor) -> None:
        """Turn the gradient of ``|t|`` into that of ``t``."""

    def through_sigmoid(self, dt: Tensor, t: Tensor) -> None:
        """Turn the gradient of ``sigmoid(t)`` into that of ``t``."""

    def exponential_penalty(self, dt: Tensor, t: Tensor, alpha: float) -> None:
        """Add the gradient of ``alpha sum exp(-t)``."""

    def variance_penalty(self, weighted: Tensor, plain: Tensor, moments: Tensor, N: int, beta: float) -> None:
        """Turn the sums of ``backward_mask`` into the gradient of ``beta std``."""

    def known_finite(self, x: Tensor) -> bool:
        """Tell whether a vector is known to be finite."""


def for_tensors(matrix: Tensor, tau: Tensor) -> ThresholdKernels:
    """Return the kernels that suit these tensors best; torch's take all, the others one threshold a row."""
    suited = matrix.dtype == tau.dtype and tau.shape[1] == 1 and matrix.is_contiguous()
    if not suited:
        return thresholds_torch
    first: ThresholdKernels = next(iter(dispatch.candidates("thresholds", matrix.device, matrix.dtype).values()))
    return first
