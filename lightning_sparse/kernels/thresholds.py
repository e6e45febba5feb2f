"""The arithmetic of thresholds, in the code that suits the tensors best."""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.compat.lightning import rank_zero_warn
from lightning_sparse.kernels import dispatch, thresholds_torch

__all__ = ["FusedKernels", "ThresholdKernels", "for_tensors", "fused", "fused_kernels"]


class ThresholdKernels(Protocol):
    """What methods with thresholds compute: the functions of ``thresholds_torch``, where they are described.

    Matrices are ``(out, n)``, ``tau`` is ``(out, 1)`` or ``(out, n)``, ``t`` and ``dt`` are vectors.
    """

    def hard_project(self, W: Tensor, tau: Tensor, out: Tensor) -> int | Tensor:
        """Write ``W * 1[|W| > tau]``; return how many weights pass."""

    def hard_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
        """Turn the gradient of what ``hard_project`` wrote into those of ``W`` and ``tau``."""

    def soft_project(self, W: Tensor, tau: Tensor, out: Tensor, shrinkage: float = 1.0) -> None:
        """Write ``sign(W) (|W| - shrinkage tau)`` where ``|W| > tau``, else 0."""

    def soft_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
        """Turn the gradient of what ``soft_project`` wrote into those of ``W`` and ``tau``."""

    def backward_mask(
        self, G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor
    ) -> None:
        """Mask a gradient by contribution scores."""

    def near(self, W: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
        """Return how many magnitudes are above ``high``, and those from ``low`` up to it."""

    def occupied(self, P: Tensor) -> tuple[int, Tensor]:
        """Return how many rows have no value other than 0, and which have one."""

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


class FusedKernels(Protocol):
    """What methods with thresholds compute with all weights of an optimizer at once, which lie end to end.

    The functions of ``ThresholdKernels`` on vectors: one number a weight's element, a threshold, a row for sums.
    """

    def hard_project(self, W: Tensor, tau: Tensor, out: Tensor) -> Tensor:
        """Write ``W * 1[|W| > tau]``; return how many of each weight pass."""

    def hard_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
        """Turn the gradient of what ``hard_project`` wrote into those of ``W`` and ``tau``."""

    def soft_project(self, W: Tensor, tau: Tensor, out: Tensor, shrinkage: float = 1.0) -> None:
        """Write ``sign(W) (|W| - shrinkage tau)`` where ``|W| > tau``, else 0."""

    def soft_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
        """Turn the gradient of what ``soft_project`` wrote into those of ``W`` and ``tau``."""

    def backward_mask(
        self, G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor
    ) -> None:
        """Mask a gradient by contribution scores."""


def fused_kernels(shapes: Sequence[tuple[int, int]], per_row: bool, device: torch.device) -> FusedKernels:
    """Return the kernels of matrices of these shapes that lie end to end.

    Args:
        shapes: ``(out, n)`` of each.
        per_row: each row has a threshold; else each matrix.
        device: where they are.
    """
    kernels: FusedKernels = fused(device).Rows.of_shapes(shapes, per_row, device)
    return kernels


def fused(device: torch.device) -> Any:
    """Return the module of kernels for all weights at once, or None where there is no use for it or it does not run.

    Raises:
        ImportError: the environment asks for it on a CPU, and Triton is not there to be interpreted.
    """
    if not dispatch.is_fused(device) or device.type not in ("cpu", "cuda"):
        return None
    return _interpreted() if device.type == "cpu" else _compiled(device)


@cache
def _interpreted() -> Any:
    try:
        found = importlib.import_module("lightning_sparse.kernels.thresholds_fused")
    except ImportError as error:
        raise ImportError(f"LIGHTNING_SPARSE_KERNELS=fused needs Triton: {error}") from error
    if not found.INTERPRETED:
        raise ImportError("LIGHTNING_SPARSE_KERNELS=fused needs TRITON_INTERPRET=1 on a CPU: set both.")
    return found


@cache
def _compiled(device: torch.device) -> Any:
    try:
        found = importlib.import_module("lightning_sparse.kernels.thresholds_fused")
        found.through_abs(torch.zeros(1, device=device), torch.zeros(1, device=device))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, torch computes
        if dispatch.wanted() == "fused":
            raise
        rank_zero_warn(
            f"Thresholds take many launches a layer: Triton does not run here ({type(error).__name__}: {error}). "
            "Install triton, and a C compiler, which it needs."
        )
        return None
    return found
