"""Ownership: which parameters each optimizer trains, so that weights are noticed that join a training later."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_sparse.layers.selection import FROZEN, ParameterChoice

__all__ = ["Ownership", "owned"]


class Ownership:
    """What would change if weights joined the training of an optimizer: the size of its groups, and frozen weights.

    Args:
        optimizers: the Trainer's.
        choices: all parameters of the module.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = (), choices: Sequence[ParameterChoice] = ()) -> None:
        self._sizes: dict[int, int] = {}
        self._frozen: dict[int, list[nn.Parameter]] = {}
        for optimizer in optimizers:
            self.note(optimizer, choices)

    def __reduce__(self) -> tuple[type["Ownership"], tuple[()]]:
        """Pickle and copy without optimizers and parameters."""
        return Ownership, ()

    def note(self, optimizer: Optimizer, choices: Sequence[ParameterChoice]) -> None:
        """See what ``optimizer`` trains now."""
        theirs = owned(optimizer)
        frozen = [choice.parameter for choice in choices if choice.reason == FROZEN]
        self._frozen[id(optimizer)] = [parameter for parameter in frozen if id(parameter) in theirs]
        self._sizes[id(optimizer)] = _size(optimizer)

    def knows(self, optimizer: Optimizer) -> bool:
        """Tell whether ``optimizer`` was there when the fit started."""
        return id(optimizer) in self._sizes

    def has_grown(self, optimizer: Optimizer) -> bool:
        """Tell whether ``optimizer`` may train more weights than it did."""
        thawed = any(parameter.requires_grad for parameter in self._frozen.get(id(optimizer), ()))
        return thawed or _size(optimizer) != self._sizes.get(id(optimizer))


def owned(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that ``optimizer`` has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
