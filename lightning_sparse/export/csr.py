"""Inference with truly sparse weights: linear layers and convolutions whose weight is a CSR matrix."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.torch_private import SIDES, children, has_forward_hooks, in_forward_mode
from lightning_sparse.export._modules import check_module
from lightning_sparse.kernels import convolutions
from lightning_sparse.kernels.geometry import Geometry, convolve
from lightning_sparse.kernels.products import matmul
from lightning_sparse.kernels.structure import CSR, check_csr
from lightning_sparse.layers.blocks import BlockLinear
from lightning_sparse.layers.functional import padded
from lightning_sparse.layers.sparse import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["CSRConv2d", "CSRLinear", "to_csr"]

_DTYPES = (torch.float32, torch.float64)
_VECTORS = ("crow_indices", "col_indices", "values")
_MANY = 16  # columns from which compiled loops, if there are any, are the quicker ones
# these compute with their children's weights themselves
_READ_THEIR_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# what a convolution is described by, and how it reads its input
_OF_CONV2D = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("output_padding", SIDES),
)


class _CSR(nn.Module):
    """Holds a weight as the three vectors of a CSR matrix, and multiplies with it.

    The vectors are buffers, so they move with the module and stand in its ``state_dict``; a state with another number
    of nonzeros loads, too. One whose indices are not those of such a weight is an error of ``load_state_dict``, and
    leaves the layer as it is.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__()
        matrix = layer.matrix
        self.shape = torch.Size(matrix.shape)
        self.register_buffer("crow_indices", matrix.crow.clone())
        self.register_buffer("col_indices", matrix.col.clone())
        self.register_buffer("values", layer.values.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse CSR tensor with int32 indices, which shares the module's memory.

        Of a linear layer it is ``(out, in)``, of a convolution ``(out, in * height * width)``, where the filters of a
        group have nonzeros for the inputs of their group alone.
        """
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=False
        )

    @property
    def _where(self) -> CSR:
        return CSR(self.crow_indices, self.col_indices, (self.shape[0], self.shape[1]))

    def _may_compile(self, x: Tensor, columns: int) -> bool:
        """Tell whether compiled loops, if there are any, can multiply with what is made of ``x``, and are quicker."""
        if _is_recorded():
            return False
        differentiated = torch.is_grad_enabled() and (x.requires_grad or self.values.requires_grad)
        return columns >= _MANY and not differentiated

    def _times(self, columns: Tensor) -> Tensor:
        """Return weight times ``columns`` ``(in, n)`` plus bias: ``(out, n)``."""
        n = columns.shape[1]
        product: Tensor
        if _is_exported():
            product = _csr_product(self.crow_indices, self.col_indices, self.values, self.shape[0], columns)
        elif n == 1:  # a vector is faster than a matrix of one column
            product = (self.weight @ columns[:, 0])[:, None]
        elif self._may_compile(columns, n):
            product = matmul(self._where, self.values, columns.contiguous())
        else:
            product = self.weight @ columns
        return product if self.bias is None else product.add_(self.bias[:, None])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        given = {name: state_dict[prefix + name] for name in _VECTORS if prefix + name in state_dict}
        groups = getattr(self, "groups", 1)
        try:
            entries = {prefix + name: given.get(name, getattr(self, name)) for name in _VECTORS}
            check_csr(entries, (self.shape[0], self.shape[1] // groups), groups)
        except ValueError as error:
            lists[-1].append(str(error))
            return
        for name in given:
            if given[name].shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_zeros(given[name].shape))
        indices = {prefix + name: given[name].int() for name in _VECTORS[:2] if name in given}
        super()._load_from_state_dict({**state_dict, **indices}, prefix, local_metadata, strict, *lists)


class CSRLinear(_CSR):
    """A linear layer for inference, whose time and memory are in proportion to the weights that are not zero.

    Args:
        linear: the layer to convert, in float32 or float64; it is not changed.

    Raises:
        ValueError: it is another layer, or in another dtype.

    Example:
        >>> import torch
        >>> from lightning_sparse.export import CSRLinear
        >>> linear = torch.nn.Linear(4, 3)
        >>> with torch.no_grad():
        ...     _ = linear.weight[:, 1:].zero_()
        >>> CSRLinear(linear)
        CSRLinear(4, 3, nonzeros=3, bias=True)
    """

    def __init__(self, linear: nn.Linear | SparseLinear) -> None:
        _check(linear, (nn.Linear, SparseLinear, BlockLinear), "linear")
        super().__init__(linear if isinstance(linear, SparseLinear) else SparseLinear.from_dense(linear))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        with torch.autocast(x.device.type, enabled=False):  # there are no sparse products in low precision
            columns = x.reshape(-1, self.shape[1]).t().to(self.values.dtype)
            return self._times(columns).t().reshape(*x.shape[:-1], self.shape[0])

    def extra_repr(self) -> str:
        """Describe the layer in ``print``."""
        return f"{self.shape[1]}, {self.shape[0]}, nonzeros={self.values.numel()}, bias={self.bias is not None}"


class CSRConv2d(_CSR):
    """A convolution for inference with a CSR weight.

    With the extra ``fast`` compiled loops compute it on a CPU. Otherwise, and where gradients of the input are computed
    or operations are traced, the input is unfolded for some images at a time.

    Args:
        conv: the layer to convert, of any kernel, stride, padding, dilation and groups, in float32 or float64; it is
            not changed.

    Raises:
        ValueError: it is another layer, or in another dtype.

    Example:
        >>> import torch
        >>> from lightning_sparse.export import CSRConv2d
        >>> CSRConv2d(torch.nn.Conv2d(4, 6, 3, padding=1))(torch.ones(2, 4, 5, 5)).shape
        torch.Size([2, 6, 5, 5])
    """

    def __init__(self, conv: nn.Conv2d | SparseConv2d) -> None:
        _check(conv, (nn.Conv2d, SparseConv2d), "conv")
        super().__init__(conv if isinstance(conv, SparseConv2d) else SparseConv2d.from_dense(conv))
        for name in _OF_CONV2D:
            setattr(self, name, getattr(conv, name))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in, height, width)``, or the same without batch, to the same with ``out`` channels."""
        with torch.autocast(x.device.type, enabled=False):
            images, geometry = padded(self, x if x.ndim == 4 else x.unsqueeze(0))
            y = self._convolved(images, geometry)
        return y if x.ndim == 4 else y.squeeze(0)

    def _convolved(self, images: Tensor, geometry: Geometry) -> Tensor:
        columns, dtype = images.shape[0] * math.prod(geometry.outputs(images.shape[2:])), self.values.dtype
        if not self._may_compile(images, columns):
            return convolve(images, self.shape[0], geometry, self._times, dtype)
        code = convolutions.backend(images.device, dtype)
        y = code.convolve(self._where, self.values, images, geometry)
        return y if self.bias is None else y.add_(self.bias[:, None, None])

    def extra_repr(self) -> str:
        """Describe the layer in ``print``, as ``nn.Conv2d`` does."""
        described = nn.Conv2d.extra_repr(self)  # type: ignore[arg-type, no-untyped-call]  # reads __dict__
        return f"{described}, nonzeros={self.values.numel()}"


def to_csr(module: nn.Module, min_sparsity: float = 0.9) -> nn.Module:
    """Return a copy of ``module`` for inference in which layers that are sparse enough compute with CSR weights.

    These are ``Linear`` and ``Conv2d`` layers in float32 or float64; others stay as they are, as do layers inside
    ``MultiheadAttention`` and ``TransformerEncoderLayer``, which use their children's weights by themselves.
    ``SparseLinear``, ``BlockLinear`` and ``SparseConv2d`` are converted whatever their sparsity, without making their
    weights dense. Weights get no gradient. ``module`` is not changed. ``torch.export`` takes the result, from torch 2.7
    on; a program that loads what it saves imports ``lightning_sparse.export`` before. ONNX has no such layers.

    Args:
        module: with exact zeros in its weights, or with sparse layers.
        min_sparsity: share of zeros from which a dense layer is converted, in [0, 1]. Whether it pays depends on the
            machine and on the size of the layer: ``benchmark`` measures it.

    Raises:
        ValueError: ``module`` is no module, or ``min_sparsity`` is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.export import to_csr
        >>> net = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:, 5:].zero_()
        >>> to_csr(net)
        Sequential(
          (0): CSRLinear(100, 100, nonzeros=500, bias=True)
          (1): ReLU()
          (2): Linear(in_features=100, out_features=2, bias=True)
        )
    """
    check_module(module)
    checks.fraction("0.9 is about where CSR begins to pay.", min_sparsity=min_sparsity)
    result = nn.ModuleDict({"root": copy.deepcopy(module)})  # a holder, so that the module itself may be converted
    done: dict[nn.Module, nn.Module] = {}
    for parent in [*result.modules()]:
        if isinstance(parent, _READ_THEIR_CHILDREN):
            continue
        for name, child in [*children(parent).items()]:
            if child is not None and _converts(child, min_sparsity):
                done[child] = done.get(child) or _CONVERTED[type(child)](child)
                children(parent)[name] = done[child]
    if not done:
        warnings.warn(
            f"No layer was converted: to_csr looks for float32 or float64 weights of Linear and Conv2d layers of which "
            f"at least {min_sparsity:.0%} are exact zeros.",
            stacklevel=2,
        )
    return result["root"].eval()


@torch.library.custom_op("lightning_sparse::csr_product", mutates_args=())
def _csr_product(crow: Tensor, col: Tensor, values: Tensor, rows: int, columns: Tensor) -> Tensor:
    """Return a CSR matrix of ``rows`` rows times ``columns``: one operation, whatever multiplies in the end."""
    where = CSR(crow, col, (rows, len(columns)))
    if columns.shape[1] >= _MANY:
        return matmul(where, values, columns.contiguous())
    return torch.sparse_csr_tensor(crow, col, values, where.shape, check_invariants=False) @ columns


@_csr_product.register_fake
def _(crow: Tensor, col: Tensor, values: Tensor, rows: int, columns: Tensor) -> Tensor:
    return columns.new_empty(rows, columns.shape[1])


_CONVERTED: dict[type[nn.Module], Any] = {
    nn.Linear: CSRLinear,
    SparseLinear: CSRLinear,
    BlockLinear: CSRLinear,
    nn.Conv2d: CSRConv2d,
    SparseConv2d: CSRConv2d,
}


def _check(layer: object, kinds: Sequence[type[nn.Module]], name: str) -> None:
    """Raise unless a layer is of these types, in a dtype that there are products for."""
    if type(layer) not in kinds:
        known = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be a layer of type {known}, got one of type {type(layer).__name__}.")
    given: Any = layer
    dtype = given.values.dtype if isinstance(layer, SparseLayer) else given.weight.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{name} must be in float32 or float64, got {dtype}. Give {name}.float().")


def _is_exported() -> bool:
    """Tell whether ``torch.export`` traces, which knows no sparse tensors."""
    asked = getattr(torch.compiler, "is_exporting", None)  # not in the oldest torch
    return bool(asked and asked())


def _is_recorded() -> bool:
    """Tell whether operations are traced, or differentiated forward: compiled loops support neither."""
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
    return bool(tracing or in_forward_mode())


def _converts(layer: nn.Module, min_sparsity: float) -> bool:
    if type(layer) not in _CONVERTED or has_forward_hooks(layer):
        return False
    if isinstance(layer, SparseLayer):
        return layer.values.dtype in _DTYPES
    weight: Any = layer.weight
    if weight.dtype not in _DTYPES or weight.numel() == 0:
        return False
    return bool((weight == 0).sum() >= min_sparsity * weight.numel())
