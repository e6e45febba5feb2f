"""Exploring: methods that tell how many of the connections have been active at any time."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_sparse.accounting.masks import Explored, bits_of_part, saved_bits
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.parts import together
from lightning_sparse.weights.base import Weight

__all__ = ["Exploring"]


class Exploring(MaskedCallback):
    """A method with masks that keeps a bit for each connection that has been active.

    Attributes:
        explored: the bits; a method marks what it grows.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.explored = Explored()

    @property
    def exploration_rate(self) -> float:
        """R_s: the share of all selected weights that have been active at any time."""
        if not self._weights:
            raise RuntimeError(f"{self!r} has no weights yet: they are chosen when trainer.fit starts.")
        return self.explored.rate(self._weights, together([*self._weights.values()]))

    @property
    def extra_metrics(self) -> dict[str, float]:
        """R_s is logged, too."""
        return {"sparsity/explored": self.exploration_rate}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The explored connections, too."""
        return [*super().state_tensors, self.explored.bits]

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over, and forget those of an earlier fit."""
        super().attach(choices, optimizers, resumed)
        self.explored.keep(self._weights)
        self._explore([weight for name, weight in self._weights.items() if name not in self.explored.bits])

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin with the first connections."""
        super().initial_masks(weights)
        self._explore(weights)

    def _explore(self, weights: Sequence[Weight]) -> None:
        for weight in self.units(weights):
            active = weight.part.indices(weight.active_indices).cpu()
            self.explored.start(weight.name, active, weight.part.length(weight.size))
            weight.forget_indices()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been explored, too."""
        explored = self.explored.state_dict()
        for unit in self.units([*self._weights.values()]):
            explored["bits"][unit.name] = saved_bits(explored["bits"][unit.name], unit.part, unit.shape)
            explored["sizes"][unit.name] = unit.size
        return {**super().state_dict(), "explored": explored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        saved, weights = state_dict["explored"], {unit.name: unit for unit in self.units([*self._weights.values()])}
        self.explored.load_state_dict(
            {
                "bits": {n: bits_of_part(x, weights[n].part, weights[n].shape) for n, x in saved["bits"].items()},
                "sizes": {n: weights[n].part.length(size) for n, size in saved["sizes"].items()},
            }
        )
