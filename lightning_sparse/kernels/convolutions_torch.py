"""Convolutions with a sparse weight as products with the unfolded input, some images at a time, on any device."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sparse.kernels import geometry, products
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.structure import CSR, Structure

if TYPE_CHECKING:
    from lightning_sparse.kernels import convolutions_torch as this
    from lightning_sparse.kernels.convolutions import Convolutions

    checked: Convolutions = this

__all__ = ["convolve", "gradients", "sampled"]


def convolve(csr: CSR, values: Tensor, x: Tensor, how: Geometry, name: str = "torch") -> Tensor:
    """Return the convolution of ``x`` with a sparse weight, ``(batch, out, height, width)``, in the values' dtype.

    Args:
        csr: where the nonzeros of the weight are.
        values: the nonzeros, ``(nnz,)``, float32 at least.
        x: ``(batch, in, height, width)``.
        how: ``x`` is read.
        name: of the backend that multiplies.
    """
    return geometry.convolve(
        x, csr.shape[0], how, lambda columns: products.matmul(csr, values, columns, name), values.dtype
    )


def gradients(
    weight: Structure,
    values: Tensor,
    x: Tensor,
    delta: Tensor,
    how: Geometry,
    wanted: tuple[bool, bool],
    name: str = "torch",
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``x``, in its dtype, and of the values, as far as they are ``wanted``.

    Args:
        weight: where the nonzeros are.
        values: the nonzeros, ``(nnz,)``, float32 at least.
        x: ``(batch, in, height, width)``.
        delta: the gradient of the result of ``convolve``.
        how: ``x`` is read.
        wanted: which gradients.
        name: of the backend that multiplies.
    """
    dx = torch.empty_like(x) if wanted[0] else None
    dvalues = torch.zeros_like(values) if wanted[1] else None
    turned = values.index_select(0, weight.permutation) if wanted[0] else values
    for images, G in _outputs(x, delta, how, values.dtype):
        if dx is not None:
            columns = products.matmul(weight.transposed, turned, G, name)
            dx[images] = how.fold(columns, len(x[images]), x.shape[2:]).to(x.dtype)
        if dvalues is not None:
            dvalues += products.sampled(weight.matrix, G, how.unfold(x[images].to(values.dtype)), name)
    return dx, dvalues


def sampled(where: CSR, x: Tensor, delta: Tensor, how: Geometry, dtype: torch.dtype, name: str = "torch") -> Tensor:
    """Return the gradient of some elements of the weight, ``(nnz,)``.

    Args:
        where: the elements.
        x: ``(batch, in, height, width)``.
        delta: the gradient of the convolution of ``x``.
        how: ``x`` is read.
        dtype: of what is multiplied and of the result, float32 at least.
        name: of the backend that multiplies.
    """
    total = delta.new_zeros(len(where.col), dtype=dtype)
    for images, G in _outputs(x, delta, how, dtype):
        total += products.sampled(where, G, how.unfold(x[images].to(dtype)), name)
    return total


def _outputs(x: Tensor, delta: Tensor, how: Geometry, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield as many images at a time as may be unfolded at once, and their output gradients, ``(out, n)``."""
    for images in how.chunks(x):
        yield images, delta[images].to(dtype).transpose(0, 1).reshape(delta.shape[1], -1).contiguous()
