"""DenseTwin: a second network that a training ends with, kept as it was before it was pruned for good."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_sparse.compat.shards import copied, whole
from lightning_sparse.rules.parts import divided_as

__all__ = ["DenseTwin"]


class DenseTwin:
    """A dense network, as the ``state_dict`` of the module, on the CPU.

    Attributes:
        values: by name; of DTensors the parts that are here. Empty: there is none yet.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def keep(self, module: nn.Module, parameters: set[int]) -> None:
        """Keep the whole module; if there is a twin already, what is new in it, and some parameters, by their ids."""
        for name, value in module.state_dict(keep_vars=True).items():
            if name not in self.values or id(value) in parameters:
                self.values[name] = copied(value, "cpu") if isinstance(value, Tensor) else copy.deepcopy(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the network with whole tensors; processes that hold parts of it call this together."""
        return {name: whole(value) for name, value in self.values.items()}

    def load(self, saved: Mapping[str, Any], module: nn.Module | None) -> None:
        """Take up the values of a checkpoint, divided over processes as those of the module are."""
        now: dict[str, Any] = module.state_dict() if module else {}
        self.values = {name: divided_as(value, now.get(name)) for name, value in saved.items()}
