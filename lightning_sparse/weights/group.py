"""WeightGroup: the weights of one optimizer, and their clock; WeightGroups: those of all optimizers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.zeroing import Zeroing

__all__ = ["WeightGroup", "WeightGroups"]


@dataclass(eq=False)
class WeightGroup:
    """The weights of one optimizer, among which connections may move, and its clock.

    Attributes:
        weights: in the order of the module.
        step: the number of optimizer steps so far.
        due: the connections are to be moved at the next step with usable gradients.
        moved: connections have been moved in the step that is under way.
        halted_by: names of parameters whose gradients were not finite at the latest step at which connections were due.
        values: further numbers of the method's state.
        zeroing: what sets the weights to 0 outside of their masks.
    """

    weights: list[Weight] = field(default_factory=list)
    step: int = 0
    due: bool = False
    moved: bool = False
    halted_by: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    zeroing: Zeroing = field(default_factory=Zeroing)

    @property
    def size(self) -> int:
        """Number of connections there might be."""
        return sum(weight.size for weight in self.weights)

    @property
    def num_active(self) -> int:
        """Number of active connections."""
        return sum(weight.num_active for weight in self.weights)

    @property
    def clock(self) -> dict[str, Any]:
        """What a checkpoint keeps of the group."""
        return {"step": self.step, "due": self.due, "values": dict(self.values)}

    @clock.setter
    def clock(self, clock: Mapping[str, Any]) -> None:
        self.step, self.due, self.values = clock["step"], clock["due"], dict(clock["values"])


class WeightGroups:
    """The groups of a fit, in the order of the Trainer's optimizers; between fits, their clocks alone."""

    def __init__(self) -> None:
        self._of: dict[int, WeightGroup] = {}
        self._clocks: list[dict[str, Any]] = []

    def begin(self, optimizers: Sequence[Optimizer], weights: Mapping[str, Weight]) -> None:
        """Make a group for each optimizer."""
        self._of = {id(optimizer): WeightGroup() for optimizer in optimizers}
        for optimizer in optimizers:
            self.join(optimizer, weights)

    def join(self, optimizer: Optimizer, weights: Mapping[str, Weight]) -> WeightGroup:
        """Put those of ``weights`` that ``optimizer`` trains into its group."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in weights.values():
            if id(weight.parameter) in owned:
                weight.optimizer = optimizer
                self._of[id(optimizer)].weights.append(weight)
        return self._of[id(optimizer)]

    def of(self, optimizer: Optimizer) -> WeightGroup:
        """Return the group of an optimizer: an empty one if it is not the Trainer's."""
        return self._of.get(id(optimizer), WeightGroup())

    def __iter__(self) -> Iterator[WeightGroup]:
        return iter(self._of.values())

    def items(self) -> Iterator[tuple[int, WeightGroup]]:
        """Yield the identity of each optimizer and its group."""
        yield from self._of.items()

    @property
    def clocks(self) -> list[dict[str, Any]]:
        """The clocks in the order of the optimizers; also between fits."""
        return [group.clock for group in self] or self._clocks

    @clocks.setter
    def clocks(self, clocks: Sequence[dict[str, Any]]) -> None:
        self._clocks = list(clocks)
        for group, clock in zip(self, self._clocks, strict=False):
            group.clock = clock

    def value(self, name: str, default: float) -> float:
        """Return a number of the methods' state: that of the first group that has it."""
        return next((clock["values"][name] for clock in self.clocks if name in clock["values"]), default)

    def end(self) -> None:
        """Keep the clocks alone."""
        self._of, self._clocks = {}, self.clocks

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without weights and optimizers."""
        return {"_of": {}, "_clocks": self.clocks}
