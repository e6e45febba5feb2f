"""How large the inputs are that a layer multiplies with each of its weights, read off a running network by hooks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.layers.unit_activity import Hooks, signed_patches

__all__ = ["InputSquares"]


class InputSquares(Hooks):
    """Sums of squares of what each weight of a layer is multiplied with, from now on until ``close``.

    The rows of a linear layer's input are its samples. Those of a convolution's are the patches that a filter sees, so
    each input channel has a sum for each place of the kernel, and zeros of the padding count.

    Args:
        layers: linear layers and convolutions, by the names of their weights.

    Attributes:
        sums: of squares by name, ``(groups, in / groups * kernel)``, in single precision at least.
        rows: how many rows each layer has seen, one number in a tensor.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.sums = {name: _zeros(layer) for name, layer in layers.items()}
        self.rows = {name: sums.new_zeros(()) for name, sums in self.sums.items()}
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._called, name), with_kwargs=True))

    @torch.no_grad()
    def _called(self, name: str, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if not self._open:
            return
        squares = (args[0] if args else kwargs["input"]).to(self.sums[name].dtype).square()
        if isinstance(layer, nn.Linear):
            rows = squares.reshape(1, -1, squares.shape[-1])
            self.sums[name] += rows.sum(1)
            self.rows[name] += rows.shape[1]
        else:
            places = output.shape[-len(layer.kernel_size) :]
            ones = squares.new_ones(output.numel() // (layer.out_channels * places.numel()), 1, *places)
            self.sums[name] += signed_patches(layer, ones, squares).view(layer.groups, -1)
            self.rows[name] += ones.numel()


def _zeros(layer: Any) -> Tensor:
    """Return a 0 for each input of each group, and of convolutions for each place of the kernel."""
    weight: Tensor = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_zeros(getattr(layer, "groups", 1), weight[0].numel(), dtype=dtype)
