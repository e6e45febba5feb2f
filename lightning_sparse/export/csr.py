"""Inference with truly sparse weights: linear layers and 1 x 1 convolutions whose weight is a CSR matrix."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CSRConv2d", "CSRLinear", "to_csr"]

_DTYPES = (torch.float32, torch.float64)
# these compute with their children's weights themselves
_READ_THEIR_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _CSR(nn.Module):
    """Holds a weight as the three vectors of a CSR matrix, and multiplies with it.

    The vectors are buffers, so they move with the module and stand in its ``state_dict``; a state with another number
    of nonzeros loads, too.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.shape = torch.Size(weight.shape)
        sparse = weight.detach().to_sparse_csr()
        self.register_buffer("crow_indices", sparse.crow_indices().int())
        self.register_buffer("col_indices", sparse.col_indices().int())
        self.register_buffer("values", sparse.values().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse CSR tensor ``(out, in)`` with int32 indices, which shares the module's memory."""
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=False
        )

    def extra_repr(self) -> str:
        """Describe the layer in ``print``."""
        return f"{self.shape[1]}, {self.shape[0]}, nonzeros={self.values.numel()}, bias={self.bias is not None}"

    def _times(self, columns: Tensor) -> Tensor:
        """Return weight times ``columns`` ``(in, n)`` plus bias: ``(out, n)``."""
        columns = columns.to(self.values.dtype)
        with torch.autocast(columns.device.type, enabled=False):  # there are no sparse products in low precision
            one = columns.shape[1] == 1  # a vector is faster than a matrix of one column
            product = (self.weight @ columns[:, 0])[:, None] if one else self.weight @ columns
        return product if self.bias is None else product + self.bias[:, None]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("col_indices", "values"):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.ndim == 1:
                setattr(self, name, getattr(self, name).new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class CSRLinear(_CSR):
    """A linear layer for inference, whose time and memory are in proportion to the weights that are not zero.

    Args:
        linear: the layer to convert; it is not changed.

    Example:
        >>> import torch
        >>> from lightning_sparse.export import CSRLinear
        >>> linear = torch.nn.Linear(4, 3)
        >>> with torch.no_grad():
        ...     _ = linear.weight[:, 1:].zero_()
        >>> CSRLinear(linear)
        CSRLinear(4, 3, nonzeros=3, bias=True)
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return self._times(x.reshape(-1, self.shape[1]).t()).t().reshape(*x.shape[:-1], self.shape[0])


class CSRConv2d(_CSR):
    """A 1 x 1 convolution for inference, without padding and groups, with a CSR weight.

    Args:
        conv: the layer to convert; it is not changed.

    Example:
        >>> import torch
        >>> from lightning_sparse.export import CSRConv2d
        >>> CSRConv2d(torch.nn.Conv2d(4, 3, 1))(torch.ones(2, 4, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.flatten(1), conv.bias)
        self.stride = conv.stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in, height, width)``, or the same without batch, to the same with ``out`` channels."""
        x = x[..., :: self.stride[0], :: self.stride[1]]
        y = self._times(x.movedim(-3, 0).flatten(1))
        return y.reshape(-1, *x.shape[:-3], *x.shape[-2:]).movedim(0, -3)


def to_csr(module: nn.Module, min_sparsity: float = 0.9) -> nn.Module:
    """Return a copy of ``module`` for inference in which layers that are sparse enough compute with CSR weights.

    These are ``Linear`` layers and 1 x 1 ``Conv2d`` without padding and groups, in float32 or float64; others stay
    dense, as do layers inside ``MultiheadAttention`` and ``TransformerEncoderLayer``, which use their children's
    weights by themselves. Weights get no gradient. ``module`` is not changed.

    Args:
        module: with exact zeros in its weights.
        min_sparsity: share of zeros from which a layer is converted, in [0, 1]. Whether it pays depends on the machine
            and on the size of the layer: ``benchmark`` measures it.

    Raises:
        ValueError: ``min_sparsity`` is out of range.

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
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity must be in [0, 1], got {min_sparsity}.")
    result = nn.ModuleDict({"root": copy.deepcopy(module)})  # a holder, so that the module itself may be converted
    done: dict[nn.Module, nn.Module] = {}
    for parent in [*result.modules()]:
        if isinstance(parent, _READ_THEIR_CHILDREN):
            continue
        for name, child in [*parent._modules.items()]:
            if child is not None and _converts(child, min_sparsity):
                done[child] = done.get(child) or _convert(child)
                parent._modules[name] = done[child]
    if not done:
        warnings.warn(
            f"No layer was converted: to_csr looks for float32 or float64 weights of Linear and 1 x 1 Conv2d layers of "
            f"which at least {min_sparsity:.0%} are exact zeros.",
            stacklevel=2,
        )
    return result["root"].eval()


def _converts(layer: nn.Module, min_sparsity: float) -> bool:
    if type(layer) is nn.Conv2d:
        if layer.kernel_size != (1, 1) or layer.groups > 1 or layer.padding not in ((0, 0), "same", "valid"):
            return False
    elif type(layer) is not nn.Linear:
        return False
    weight, hooks = layer.weight, (layer._forward_hooks, layer._forward_pre_hooks)
    if weight.dtype not in _DTYPES or weight.numel() == 0 or any(hooks):
        return False
    return int((weight == 0).sum()) >= min_sparsity * weight.numel()


def _convert(layer: nn.Module) -> nn.Module:
    return CSRLinear(layer) if isinstance(layer, nn.Linear) else CSRConv2d(layer)  # type: ignore[arg-type]  # _converts
