"""Convolutions with a sparse weight: by unfolding on any device, or by compiled code where that is installed.

The backends are those of ``products``, with the same names.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.structure import CSR, Structure

__all__ = ["Convolutions", "backend"]


class Convolutions(Protocol):
    """What sparse layers compute: the functions of ``convolutions_torch``, where they are described."""

    def convolve(self, csr: CSR, values: Tensor, x: Tensor, how: Geometry) -> Tensor:
        """Return the convolution of ``x``."""

    def gradients(
        self, weight: Structure, values: Tensor, x: Tensor, delta: Tensor, how: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of ``x`` and of the values."""

    def sampled(self, where: CSR, x: Tensor, delta: Tensor, how: Geometry, dtype: torch.dtype) -> Tensor:
        """Return the gradient of some elements of the weight."""


def backend(device: torch.device, dtype: torch.dtype, name: str | None = None) -> Convolutions:
    """Return the convolutions of the backend of this name, or of the first that suits if it is none of these.

    Raises:
        ValueError: there is no backend of this name anywhere.
    """
    convolutions: Convolutions = dispatch.chosen("convolutions", device, dtype, name)
    return convolutions
