"""Sparse layers computed with a dense weight that exists during the pass alone: where dense products are quicker.

Parameters, gradients and optimizer state stay the nonzeros. The weight is made for the forward pass, and again for the
backward pass; there its gradient is dense for a moment, too.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_sparse.layers.functional import Geometry

__all__ = ["conv2d_densely", "linear_densely"]


def linear_densely(x: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``x W.T + bias``; all of one dtype.

    Args:
        x: ``(..., in)``.
        values: the nonzeros of the weight, ``(nnz,)``.
        bias: ``(out,)`` or None.
        positions: flat ones of the nonzeros in the weight, ``(nnz,)``.
        shape: of the weight, ``(out, in)``.
    """
    result: Tensor = _Linear.apply(x, values, bias, positions, shape)  # type: ignore[no-untyped-call]
    return result


def conv2d_densely(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    shape: Sequence[int],
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """Return the convolution of ``x`` ``(batch, in, height, width)``; other arguments as in ``linear_densely``."""
    result: Tensor = _Conv2d.apply(x, values, bias, positions, shape, geometry, groups)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, shape: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(x, values, positions)
        ctx.shape = shape
        return functional.linear(x, _dense(values, positions, shape), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ _dense(values, positions, ctx.shape)
        if ctx.needs_input_grad[1]:
            dvalues = _at(positions, rows.t() @ x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dvalues, dbias, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        shape: Sequence[int],
        geometry: Geometry,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, positions)
        ctx.shape, ctx.geometry, ctx.groups = shape, geometry, groups
        _, stride, padding, dilation = geometry
        return functional.conv2d(x, _dense(values, positions, shape), bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        _, *steps = ctx.geometry
        of_x, of_values, of_bias = ctx.needs_input_grad[:3]

        def gradients(W: Tensor, *wanted: bool) -> Any:
            return torch.ops.aten.convolution_backward(
                gradient, x, W, [len(W)], *steps, False, (0, 0), ctx.groups, wanted
            )

        # the weight is freed before its gradient is made, which asks for its shape alone
        dx = gradients(_dense(values, positions, ctx.shape), True, False, False)[0] if of_x else None
        dvalues = dbias = None
        if of_values or of_bias:
            _, dW, dbias = gradients(values.new_empty(1).expand(ctx.shape), False, of_values, of_bias)
            dvalues = _at(positions, dW) if of_values else None
        return dx, dvalues, dbias, None, None, None, None


def _dense(values: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_zeros(math.prod(shape)).index_copy_(0, positions, values).view(shape)


def _at(positions: Tensor, gradient: Tensor) -> Tensor:
    return gradient.reshape(-1).index_select(0, positions)
