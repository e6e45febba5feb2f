"""Sparse layers in several processes: what DDP cannot do for values that change their length."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.torch_private import hidden_from_ddp, hide_from_ddp
from lightning_sparse.layers.sparse import SparseLayer

__all__ = ["Ignored", "average_gradients", "copy_from_first"]


class Ignored:
    """Parameters and buffers that DDP leaves alone, from now on until ``remove``.

    Args:
        module: that DDP will wrap.
        names: theirs.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, names
        hide_from_ddp(module, [*hidden_from_ddp(module), *names])

    def remove(self) -> None:
        """Hand them back to DDP, but for those that others have named, too."""
        left = hidden_from_ddp(self._module)
        for name in self._names:
            if name in left:
                left.remove(name)
        hide_from_ddp(self._module, left)
        self._names = ()

    def refuse_nothing_left(self) -> None:
        """Raise if DDP would be left without a parameter to train, which it does not accept."""
        names = set(hidden_from_ddp(self._module))
        if all(name in names or not parameter.requires_grad for name, parameter in self._module.named_parameters()):
            raise MisconfigurationException(
                "DDP needs a parameter of its own beside those of the sparse layers that change their size. Give a "
                "layer a bias, keep one dense with exclude=[...], or use storage='masked'."
            )


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Average the gradients over the processes, in one message for each dtype.

    As under DDP, a process that has none counts as one with zeros; where no process has one, none is made.
    """
    alike: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault(parameter.dtype, []).append(parameter)
    for dtype, members in alike.items():
        used = torch.tensor([member.grad is not None for member in members], dtype=dtype, device=members[0].device)
        flat = torch.cat([used, *map(_gradient, members)])
        flat /= distributed.get_world_size(group)  # not after the sum, which may overflow
        distributed.all_reduce(flat, group=group)
        used, *gradients = torch.split(flat, [len(members), *map(len, members)])
        for member, gradient, anywhere in zip(members, gradients, used.tolist(), strict=True):
            if anywhere and member.grad is None:
                member.grad = gradient.clone()
            elif anywhere:
                member.grad.copy_(gradient)  # type: ignore[union-attr]


@torch.no_grad()
def copy_from_first(layers: Iterable[SparseLayer]) -> None:
    """Give the layers of every process the connections and values of the first."""
    for layer in layers:
        nnz = torch.tensor(layer.nnz, device=layer.values.device)
        distributed.broadcast(nnz, 0)
        positions, values = layer.positions, layer.values.detach().clone()
        if len(values) != nnz:
            positions, values = positions.new_empty(int(nnz)), values.new_empty(int(nnz))
        distributed.broadcast(positions, 0)
        distributed.broadcast(values, 0)
        layer.set_connections(positions, values)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
