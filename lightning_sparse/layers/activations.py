"""SparseInput: lets a layer keep, for the gradient of its weight, only the largest values of what it reads."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_sparse.compat.torch_private import AttentionOutput
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import budget

__all__ = ["SparseInput", "largest", "readers", "save_sparse_inputs"]

# their output is linear in their one input, which autograd saves for the weight's gradient alone
_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def largest(x: Tensor, sparsity: float) -> Tensor:
    """Return ``x`` with its smallest magnitudes, a share ``sparsity``, set to 0.

    >>> largest(torch.tensor([3.0, -1.0, -4.0, 1.0]), 0.5)
    tensor([ 3., -0., -4.,  0.])
    """
    k = budget(sparsity, x.numel())
    return (
        x if select.count(x) <= k else x * select.top_k(x.abs(), k)
    )  # zeros, of which there may be many, need no rank


class SparseInput:
    """Hooks of one layer: while it runs, autograd saves the largest values of its input in place of the input.

    The output is that of the whole input, and so is the input's gradient; the weight's is computed from what was saved.

    Args:
        sparsity: share of the input, over batch and features, that is dropped.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self._open: list[saved_tensors_hooks | None] = []

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Tell whether ``layer`` is a linear or convolution layer that reads its input as it is, or padded with 0."""
        if not isinstance(layer, _LAYERS) or isinstance(layer, AttentionOutput):
            return False
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            return False
        if getattr(layer, "padding", 0) != "same":
            return True
        spans = zip(getattr(layer, "kernel_size", ()), getattr(layer, "dilation", ()), strict=True)
        return all(d * (k - 1) % 2 == 0 for k, d in spans)  # else torch pads a copy first

    def register(self, layer: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on ``layer``; return what takes them away."""
        before = layer.register_forward_pre_hook(self._before)
        return [before, layer.register_forward_hook(self._after, always_call=True)]

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        weight: Any = layer.weight
        if not (args and torch.is_grad_enabled() and weight.requires_grad):
            self._open.append(None)
            return None
        x = _as_read(args[0])
        kept = torch.empty_like(x.detach()).copy_(largest(x.detach(), self.sparsity))  # in the same order of memory

        def pack(saved: Tensor) -> Tensor:
            if saved.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                return saved
            return kept.as_strided(saved.shape, saved.stride(), saved.storage_offset() - x.storage_offset())

        hooks = saved_tensors_hooks(pack, _unpack)
        hooks.__enter__()
        self._open.append(hooks)
        return (x, *args[1:])

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        hooks = self._open.pop() if self._open else None
        if hooks is not None:
            hooks.__exit__(None, None, None)


def readers(module: nn.Module, weights: Mapping[str, nn.Parameter | None]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in ``module`` that read one of ``weights`` and that ``SparseInput`` suits, with its name."""
    names = {id(weight): name for name, weight in weights.items()}
    for layer in module.modules():
        name = names.get(id(getattr(layer, "weight", None)))
        if name is not None and SparseInput.suits(layer):
            yield name, layer


def save_sparse_inputs(
    module: nn.Module, weights: Mapping[str, nn.Parameter | None], sparsity: float, handles: list[Any]
) -> list[str]:
    """Make the layers in ``module`` that read one of ``weights`` save the largest values of their inputs.

    Args:
        module: whose layers are hooked.
        weights: by name.
        sparsity: see ``SparseInput``; 0 hooks no layer.
        handles: what takes the hooks away is added to these.

    Returns:
        The names of the weights that these layers read.
    """
    layers = [*readers(module, weights)] if sparsity else []
    for _, layer in layers:
        handles += SparseInput(sparsity).register(layer)
    return [name for name, _ in layers]


def _as_read(x: Tensor) -> Tensor:
    """Return ``x`` in the precision and order of memory in which the layer's operation saves it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _unpack(saved: Tensor) -> Tensor:
    return saved
