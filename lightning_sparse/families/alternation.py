"""Alternation: which phase of a training, dense or sparse, the masks of each optimizer's weights belong to."""

from math import ceil
from typing import Literal, Protocol

from lightning_sparse.rules.clock import times
from lightning_sparse.rules.phases import Phases, alternating, bounds, cycles_that_fit
from lightning_sparse.weights.group import WeightGroup

__all__ = ["Alternation"]

#: in place of a phase's number, odd as those of sparse ones: an earlier fit has pruned the network
_PRUNED_BEFORE = -1.0


class _Method(Protocol):
    """What an alternation asks of its method."""

    begin_at: float
    last_dense: float
    end_at: float
    cycles: int | Literal["auto"]

    def warn_once(self, message: str) -> None: ...


class Alternation:
    """The phases of one method.

    Args:
        method: whose options divide the training.

    Attributes:
        phases: of this fit; none until it has begun.
    """

    def __init__(self, method: _Method) -> None:
        self.method = method
        self.phases = Phases()

    def divided(self, total: int, num_epochs: int | None) -> Phases:
        """Return the phases of a training of ``total`` steps and ``num_epochs`` epochs, if these are known."""
        method = self.method
        found = bounds(total, method.begin_at, method.last_dense, method.end_at)
        if method.cycles == "auto":
            return alternating(*found, cycles_that_fit(found.between, ceil(total / num_epochs) if num_epochs else 1))
        most = found.most_cycles
        if method.cycles > most:
            method.warn_once(
                f"{method!r} alternates {times(most)} only: the training has {total} steps, too few for its cycles. "
                "Lower cycles, or train longer."
            )
        return alternating(*found, min(method.cycles, most))

    def is_due(self, group: WeightGroup) -> bool:
        """Tell whether another phase begins, or has begun while gradients were not finite."""
        return self._number(group) not in (_PRUNED_BEFORE, self.phases.at(group.step))

    def begin(self, group: WeightGroup) -> None:
        """Note that the phase of this step begins, unless an earlier fit has pruned the weights."""
        if self._number(group) != _PRUNED_BEFORE:
            group.values["phase"] = self.phases.at(group.step)

    def begin_pruned(self, group: WeightGroup) -> None:
        """Note that an earlier fit has pruned the weights: they keep their masks."""
        group.values["phase"] = _PRUNED_BEFORE

    def is_sparse(self, group: WeightGroup) -> bool:
        """Tell whether the masks belong to a sparse phase."""
        return self._number(group) % 2 == 1

    def is_last(self, group: WeightGroup) -> bool:
        """Tell whether they belong to the last phase."""
        return self._number(group) == self.phases.last

    def is_unfinished(self, group: WeightGroup) -> bool:
        """Tell whether phases are to come."""
        return self._number(group) not in (_PRUNED_BEFORE, self.phases.last)

    def _number(self, group: WeightGroup) -> float:
        """Return the number of the phase that the masks of ``group`` belong to; odd: a sparse one."""
        return group.values.get("phase", 0)
