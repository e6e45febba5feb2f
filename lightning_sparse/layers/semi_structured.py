"""SemiStructuredLinear: a linear layer that, in training, multiplies by a 2:4 weight with operators for such weights.

The weight stays the dense parameter that it is. Of the three products of a step, that of the output is 2:4, and that of
the input's gradient as well if the transpose of the weight is 2:4 (transposable tiles). The gradient of the weight is a
dense product: latent weights need all of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_sparse.compat.shards import is_sharded
from lightning_sparse.kernels import semi_structured as kernels
from lightning_sparse.layers.functional import product_dtype, without_autocast

__all__ = ["MadeSemiStructured", "SemiStructuredLinear", "linear_2_4", "made_semi_structured", "why_dense"]


class _Traces(Protocol):
    """What tells whether a parameter still is as its method wrote it."""

    def differs(self, parameter: Any) -> bool: ...


def linear_2_4(x: Tensor, W: Tensor, bias: Tensor | None, both: bool) -> Tensor:
    """Return ``x W.T + bias``; all of one dtype.

    Args:
        x: ``(..., in)``.
        W: ``(out, in)``, 2:4.
        bias: ``(out,)`` or None.
        both: ``W.T`` is 2:4, too.
    """
    result: Tensor = _Linear.apply(x, W, bias, both)  # type: ignore[no-untyped-call]
    return result


class SemiStructuredLinear(nn.Linear):
    """``nn.Linear`` whose weight a method keeps 2:4; ``MadeSemiStructured`` makes one.

    It computes densely where no operator for 2:4 pays, out of training, within ``torch.compile``, and while the weight
    holds what other code has written, which may not be 2:4.

    Attributes:
        both: the transpose of the weight is 2:4, too.
        traces: tells whether other code has written into the weight.
        why_dense: why training computed densely at last; None: it did not.
    """

    both: bool
    traces: _Traces
    why_dense: str | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as nn.Linear names it)
        """Return ``x W.T + bias`` for ``x`` ``(..., in_features)``."""
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        dtype = product_dtype(input.device.type, self.weight.dtype)
        shape, capability = tuple(self.weight.shape), kernels.capability(input.device)
        self.why_dense = kernels.why_dense(shape, dtype, capability, self.both)
        if self.why_dense or self.traces.differs(self.weight):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return linear_2_4(input.to(dtype), self.weight.to(dtype), bias, self.both)


class MadeSemiStructured:
    """Turns a layer, exactly of type ``nn.Linear``, into a ``SemiStructuredLinear`` in place, until ``remove``.

    Args:
        layer: which.
        both: the transpose of its weight is 2:4, too.
        traces: tells whether other code has written into the weight.
    """

    def __init__(self, layer: nn.Linear, both: bool, traces: _Traces) -> None:
        made: Any = layer
        made.__class__ = SemiStructuredLinear
        made.both, made.traces, made.why_dense = both, traces, "not in training yet, or within torch.compile"
        self.layer = made

    def remove(self) -> None:
        """Make it ``nn.Linear`` again."""
        if type(self.layer) is SemiStructuredLinear:
            del self.layer.both, self.layer.traces, self.layer.why_dense
            self.layer.__class__ = nn.Linear  # type: ignore[assignment]


def made_semi_structured(
    module: nn.Module, parameters: Sequence[nn.Parameter | None], both: bool, traces: _Traces
) -> list[MadeSemiStructured]:
    """Turn all linear layers of ``module`` into semi-structured ones whose weights, held whole, are ``parameters``."""
    ours = {id(parameter) for parameter in parameters}
    plain = [layer for layer in module.modules() if type(layer) is nn.Linear and not is_sharded(layer.weight)]
    return [MadeSemiStructured(layer, both, traces) for layer in plain if id(layer.weight) in ours]


def why_dense(handles: Sequence[Any], parameters: Mapping[str, nn.Parameter | None]) -> dict[str, list[str]]:
    """Return the names of the weights that training multiplies by as dense ones, by the reason.

    Args:
        handles: those of ``made_semi_structured``, and others.
        parameters: all weights, by name.
    """
    layers = {id(each.layer.weight): each.layer for each in handles if isinstance(each, MadeSemiStructured)}
    found: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        layer = layers.get(id(parameter))
        reason = layer.why_dense if layer else "not the weight of an nn.Linear that this process holds whole"
        if reason:
            found.setdefault(reason, []).append(name)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, both: bool) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.both = both
        return kernels.linear(_rows(x), W, bias).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        delta = _rows(dy)
        dx = dW = dbias = None
        if ctx.needs_input_grad[0]:
            dx = kernels.linear(delta, W.t().contiguous()) if ctx.both else delta @ W
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            dW = delta.t() @ _rows(x)
        if ctx.needs_input_grad[2]:
            dbias = delta.sum(0)
        return dx, dW, dbias, None


def _rows(x: Tensor) -> Tensor:
    """Return ``(..., features)`` as ``(n, features)``, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
