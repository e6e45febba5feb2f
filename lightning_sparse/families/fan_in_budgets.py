"""FanInBudgets: how many connections the neurons of a layer have where each has as many (SRigL, Sec. 3).

A layer has ``n`` connections to spend, those that it begins with, whatever happens to its neurons. So rounding errors
of one update are no part of the next.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_sparse.rules.budgets import least
from lightning_sparse.rules.fan_in import FanIn, nearest
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup, WeightGroups

__all__ = ["FanInBudgets"]


class FanInBudgets:
    """The budgets of the layers of one method.

    Args:
        pattern: counts the connections of neurons.
        min_layer_density: the least density of a layer.
        groups: of the method; they keep the budgets, by the names of the layers.
    """

    def __init__(self, pattern: FanIn, min_layer_density: float, groups: WeightGroups) -> None:
        self.pattern, self.min_layer_density, self.groups = pattern, min_layer_density, groups

    def fan_ins(self, weight: Weight) -> Tensor:
        """Return the number of connections of each neuron, ``(out,)``."""
        return self.pattern.fan_ins(weight, weight.active_indices)

    def of(self, weight: Weight) -> int:
        """Return ``n``: how many connections the layer had when it was first asked for."""
        assert weight.optimizer is not None
        return int(self.groups.of(weight.optimizer).values.setdefault(weight.name, weight.num_active))

    def fan_in(self, weight: Weight, neurons: int) -> int:
        """Return ``k'`` of so many neurons, with which the layer keeps its least density."""
        return nearest(self.of(weight), neurons, least(self.min_layer_density, weight.size))

    def target_count(self, group: WeightGroup) -> int:
        """Return how many connections the neurons of a group have that have any, with whole fan-ins."""
        neurons = [(weight, int((self.fan_ins(weight) > 0).sum())) for weight in group.weights]
        return sum(m * self.fan_in(weight, m) for weight, m in neurons)

    def ablated(self, weight: Weight, active: Tensor, salient: Tensor, min_salient: float) -> Tensor:
        """Mark the neurons to ablate, ``(out,)``: none of a layer whose rows are divided by their norms.

        If the others could not hold ``n`` connections, those with the most salient ones stay.

        Args:
            weight: that they belong to.
            active: number of connections of each, ``k`` or 0.
            salient: number of salient connections of each.
            min_salient: a neuron that has less than this share of ``k`` is ablated.
        """
        marks = torch.zeros_like(active, dtype=torch.bool)
        if weight.nonempty is not None:
            return marks
        fan_in, k = weight.size // len(active), int(active.max())
        below = ((active > 0) & (salient < least(min_salient, k))).nonzero().view(-1)
        most = int((active > 0).sum()) - -(-self.of(weight) // fan_in)  # or the others could not hold n
        marks[below[salient[below].argsort(stable=True)[:most]]] = True
        return marks

    def surplus(self, weights: Iterable[Weight], total: int) -> int:
        """Return how many connections there are above a budget ``total``, which whole fan-ins cannot meet.

        Each layer may have half as many as it has neurons, or as many where the least density rounds up; 0 if there are
        more, which nothing explains.
        """
        held: Sequence[Weight] = [*weights]
        above = sum(weight.num_active for weight in held) - total
        neurons = [len(self.fan_ins(weight)) for weight in held]
        largest = (2 if self.min_layer_density else 1) * sum(neurons) + max(neurons, default=0)
        return above if 2 * abs(above) <= largest else 0
