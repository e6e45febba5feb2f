"""Linear layers and convolutions with a sparse weight, and their gradients: time and memory go with the nonzeros.

A weight is a vector of values and a ``Structure``. Products run in float32 at least, whatever the dtype of the input.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from lightning_sparse.compat.torch_private import padded_sides
from lightning_sparse.kernels import convolutions
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.products import matmul, sampled, transposed
from lightning_sparse.kernels.structure import CSR, Structure

__all__ = [
    "Geometry",
    "conv2d",
    "conv2d_gradient",
    "conv2d_gradient_rows",
    "exact_dtype",
    "linear",
    "linear_gradient",
    "linear_gradient_rows",
    "padded",
    "product_dtype",
    "without_autocast",
]

F = TypeVar("F", bound=Callable[..., Any])


def linear(x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure) -> Tensor:
    """Return ``x W.T + bias``.

    Args:
        x: ``(..., in)``.
        values: the nonzeros of the weight ``(out, in)``, ``(nnz,)``.
        bias: ``(out,)`` or None.
        weight: where the nonzeros are.
    """
    result: Tensor = _Linear.apply(x, values, bias, weight)  # type: ignore[no-untyped-call]
    return result


def conv2d(x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure, geometry: Geometry) -> Tensor:
    """Return the convolution of ``x`` ``(batch, in, height, width)``; other arguments as in ``linear``.

    What the computation takes beside the result does not grow with the batch.
    """
    result: Tensor = _Conv2d.apply(x, values, bias, weight, geometry)  # type: ignore[no-untyped-call]
    return result


def linear_gradient(x: Tensor, delta: Tensor, where: CSR, backend: str | None = None) -> Tensor:
    """Return the gradient of some elements of a linear layer's weight, ``(nnz,)``, in float32 at least.

    Args:
        x: the layer's input, ``(..., in)``.
        delta: the gradient of the loss with respect to its output, ``(..., out)``.
        where: the elements; it need not be the layer's own nonzeros.
        backend: who multiplies.
    """
    dtype = exact_dtype(delta.dtype)
    return sampled(where, _columns(delta, dtype, backend), _columns(x, dtype, backend), backend)


def conv2d_gradient(x: Tensor, delta: Tensor, where: CSR, geometry: Geometry, backend: str | None = None) -> Tensor:
    """Return the gradient of some elements of a convolution's weight; arguments as in ``linear_gradient``."""
    dtype = exact_dtype(delta.dtype)
    return convolutions.backend(delta.device, dtype, backend).sampled(where, x, delta, geometry, dtype)


def linear_gradient_rows(x: Tensor, delta: Tensor, rows: slice, out: Tensor | None = None) -> Tensor:
    """Return the gradient of some rows of a linear layer's weight, ``(rows, in)``; ``x`` and ``delta`` as above.

    ``out``, of the dtype that products run in, may hold it.
    """
    dtype = exact_dtype(delta.dtype)
    outputs = delta.reshape(-1, delta.shape[-1])[:, rows]
    return torch.mm(outputs.t().to(dtype), x.reshape(-1, x.shape[-1]).to(dtype), out=out)


def conv2d_gradient_rows(
    x: Tensor, delta: Tensor, rows: slice, shape: Sequence[int], geometry: Geometry, groups: int = 1
) -> Tensor:
    """Return the gradient of some filters of a convolution, ``(rows, in / groups, *kernel)``.

    Args:
        x: its input, ``(batch, in, height, width)``.
        delta: the gradient of the loss with respect to its output.
        rows: the filters.
        shape: of the weight.
        geometry: how ``x`` is read.
        groups: of the convolution.
    """
    out, per_group, *kernel = shape
    dtype = exact_dtype(delta.dtype)
    gradient = delta.new_zeros(rows.stop - rows.start, per_group, *kernel, dtype=dtype)
    for images in geometry.chunks(x):
        for group in range(rows.start * groups // out, (rows.stop - 1) * groups // out + 1):
            low, high = max(rows.start, group * out // groups), min(rows.stop, (group + 1) * out // groups)
            inputs = x[images, group * per_group : (group + 1) * per_group].to(dtype)
            part: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
                inputs,
                (high - low, per_group, *kernel),
                delta[images, low:high].to(dtype),
                geometry.stride,
                geometry.padding,
                geometry.dilation,
            )
            gradient[low - rows.start : high - rows.start] += part
    return gradient


def padded(conv: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return ``x`` with the padding that unfolding cannot add, and how a convolution reads it.

    Args:
        conv: has the attributes of ``nn.Conv2d`` but the weight.
        x: ``(batch, in, height, width)``.
    """
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = functional.pad(x, padded_sides(conv), mode=mode), (0, 0)
    return x, Geometry(conv.kernel_size, conv.stride, padding, conv.dilation)


def without_autocast(backward: F) -> F:
    """Have a backward pass within autocast, as ``manual_backward`` runs it, compute in the dtypes that it chooses."""

    @wraps(backward)
    def exact(ctx: Any, gradient: Tensor) -> Any:
        if not torch.is_autocast_enabled(gradient.device.type):
            return backward(ctx, gradient)
        with torch.autocast(gradient.device.type, enabled=False):
            return backward(ctx, gradient)

    return exact  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure) -> Tensor:
        ctx.save_for_backward(x, values, *weight.tensors)  # let go after the backward pass, the graph may live on
        ctx.backend = weight.backend
        dtype = exact_dtype(values.dtype)
        y = matmul(weight.matrix, values.to(dtype), _columns(x, dtype, weight.backend), weight.backend)
        if bias is not None:
            y += bias.to(dtype).unsqueeze(1)
        return transposed(y, weight.backend).view(*x.shape[:-1], len(y))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        weight, dtype = Structure.of(indices, ctx.backend), exact_dtype(values.dtype)
        G = _columns(gradient, dtype, ctx.backend)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = transposed(_matmul_transposed(weight, values.to(dtype), G), ctx.backend).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = sampled(weight.matrix, G, _columns(x, dtype, ctx.backend), ctx.backend).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dbias = G.sum(1).to(values.dtype)
        return dx, dvalues, dbias, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, values, *weight.tensors)
        ctx.backend, ctx.geometry = weight.backend, geometry
        dtype = exact_dtype(values.dtype)
        code = convolutions.backend(x.device, dtype, weight.backend)
        y = code.convolve(weight.matrix, values.to(dtype), x, geometry)
        return y if bias is None else y.add_(bias.to(dtype).view(-1, 1, 1))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        weight, dtype = Structure.of(indices, ctx.backend), exact_dtype(values.dtype)
        code = convolutions.backend(x.device, dtype, ctx.backend)
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dx, dvalues = code.gradients(weight, values.to(dtype), x, gradient, ctx.geometry, wanted)
        dbias = gradient.sum((0, 2, 3), dtype=dtype).to(values.dtype) if ctx.needs_input_grad[2] else None
        return dx, None if dvalues is None else dvalues.to(values.dtype), dbias, None, None


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what products run in."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what a layer with weights of ``dtype`` returns now, on a device of this type."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and dtype != torch.float64 else dtype


def _columns(x: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Return ``(..., features)`` as ``(features, n)``, contiguous."""
    return transposed(x.reshape(-1, x.shape[-1]).to(dtype), backend)


def _matmul_transposed(weight: Structure, values: Tensor, G: Tensor) -> Tensor:
    return matmul(weight.transposed, values.index_select(0, weight.permutation), G, weight.backend)
