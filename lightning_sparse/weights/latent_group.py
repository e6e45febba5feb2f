"""LatentGroup: the weights of one optimizer that trains latent weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_sparse.weights.joined import Joined
from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.thresholds import ThresholdBuffer

__all__ = ["LatentGroup", "update_counts"]


@dataclass(eq=False)
class LatentGroup:
    """The weights of one optimizer.

    Attributes:
        weights: in the order in which its param groups have them.
        updates: number of its updates, by which a method can tell when it is time.
        joined: weights that are computed with at once where all of them take part.
        buffers: their thresholds, laid end to end in the order of ``weights``; empty if the method has none.
    """

    weights: list[LatentWeight] = field(default_factory=list)
    updates: int = 0
    joined: list[Joined] = field(default_factory=list)
    buffers: list[ThresholdBuffer] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy weights by themselves."""
        return {**self.__dict__, "joined": [], "buffers": []}

    def join(self, optimizer: Optimizer, weights: Iterable[LatentWeight]) -> None:
        """Take those of some weights that ``optimizer`` updates, in the order of its param groups."""
        of = {id(weight.parameter): weight for weight in weights}
        self.weights += [of[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in of]

    def parts(self, weights: Sequence[LatentWeight]) -> list[LatentWeight | Joined]:
        """Return what some of the weights are computed with as: joined ones, and the others by themselves."""
        if not self.joined:
            return [*weights]
        left = {id(weight): weight for weight in weights}
        found: list[LatentWeight | Joined] = []
        for each in self.joined:
            if all(id(weight) in left and weight.frozen is None for weight in each.weights):
                found.append(each)
                left = {key: weight for key, weight in left.items() if weight not in each.weights}
        return [*found, *left.values()]

    def go_on(self, updates: Mapping[str, int]) -> None:
        """Set the clock to that of the weight that has seen most updates, by the weights' names."""
        self.updates = max((updates.get(weight.name, 0) for weight in self.weights), default=0)


def update_counts(groups: Iterable[LatentGroup]) -> dict[str, int]:
    """Return the number of updates of each weight by name."""
    return {weight.name: group.updates for group in groups for weight in group.weights}
