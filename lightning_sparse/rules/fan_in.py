"""Constant fan-in: in a layer, all neurons that have connections have the same number of them (SRigL, Sec. 3)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from lightning_sparse.rules import select
from lightning_sparse.rules.ascending import contains
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.groups import candidates
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, parts, rows_of
from lightning_sparse.rules.parts import WHOLE, Whole
from lightning_sparse.rules.patterns import Laid, Pattern, Sized, other_rows
from lightning_sparse.rules.rows import top_k_of_rows
from lightning_sparse.rules.tiles import Tiles

__all__ = ["FanIn", "least_of_rows", "nearest", "whole_fan_ins"]

_AT_ONCE = 1 << 20  # connections there might be, for which random numbers are drawn together


class FanIn(Pattern):
    """Each neuron of a layer has ``k`` connections, or none: it is ablated. A neuron of a convolution is a filter."""

    @property
    def kind(self) -> str:
        """``"fan-in"``."""
        return "fan-in"

    def misfit(self, shape: tuple[int, ...], outputs: Outputs, nonempty: Outputs | None) -> str | None:
        """Return why a weight has no neurons with inputs of their own."""
        return other_rows(outputs, nonempty) or _neurons(shape, outputs).misfit

    def fits(self, mask: Tensor, outputs: Outputs) -> bool:
        """Tell whether all neurons have the same number of connections, or none."""
        found = as_matrix(mask, outputs).sum(1)
        return bool(((found == 0) | (found == found.max())).all())

    def at_least(self, weight: Sized, n: int) -> int:
        """Return the smallest number, ``n`` or more, of whole fan-ins: each neuron begins with a connection."""
        neurons = weight.outputs.rows(weight.shape)
        return nearest(n, neurons, n) * neurons

    def counts(self, weights: Sequence[Sized], shares: Sequence[int]) -> list[int]:
        """Return the number of connections of each weight, whole fan-ins, near its share."""
        neurons = [weight.outputs.rows(weight.shape) for weight in weights]
        return [k * n for k, n in zip(whole_fan_ins(shares, neurons), neurons, strict=True)]

    def draw(
        self,
        n: int,
        shape: tuple[int, ...],
        generator: Generator,
        nonempty: Outputs | None = None,
        outputs: Outputs = FIRST,
        part: Whole = WHOLE,
    ) -> Tensor:
        """Return ``n`` positions of a whole weight, as many in each row: all sets of inputs are equally likely."""
        neurons = _neurons(shape, outputs)
        rows = torch.arange(outputs.rows(shape))
        k, chosen = n // len(rows), []
        for some in torch.split(rows, max(1, _AT_ONCE // neurons.size)):
            places = neurons.members(some)
            keys = torch.rand(places.shape, generator=generator, dtype=torch.float32)  # whatever the precision
            chosen.append(places.gather(1, keys.topk(k, sorted=False).indices).view(-1))
        return torch.cat(chosen).sort().values

    def top_k(self, weight: Laid, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Mark the largest of each row, ``k`` in all."""
        return top_k_of_rows(scores, k, weight.outputs)

    def num_movable(self, weight: Connections) -> int:
        """Return how many connections of neurons that have some can be dropped, with others to take their places."""
        there = int((self.fan_ins(weight, weight.active_indices) > 0).sum())
        return min(weight.num_active, there * _neurons(weight.shape, weight.outputs).size - weight.num_active)

    # ------------------------------------------------------------------ neurons that differ

    def fan_ins(self, weight: Connections, positions: Tensor) -> Tensor:
        """Return how many of some flat positions each neuron has: ``(out,)``, on the CPU."""
        rows = rows_of(positions.cpu(), weight.shape, weight.outputs)
        return torch.bincount(rows, minlength=weight.outputs.rows(weight.shape))

    def largest_gradients(self, weight: Connections, n: int) -> Tensor:
        """Return the ``n`` inactive connections of largest ``|dP|`` among neurons that have connections."""
        there = self.fan_ins(weight, weight.active_indices) > 0
        if there.all():
            return weight.largest_gradients(n)[0]
        return select.largest(_of_rows(weight, there), n, weight.shape)[0]

    def trimmed(self, weight: Connections, dropped: Tensor, fan_ins: Tensor) -> Tensor:
        """Return what goes so that neurons can come to these fan-ins: all of a neuron that is to have none.

        Of others, those ``dropped``, but of no neuron more than the inactive connections that it does not need.
        """
        places, room = weight.active_indices.cpu(), _neurons(weight.shape, weight.outputs).size - fan_ins
        rows = rows_of(places, weight.shape, weight.outputs)
        goes = contains(dropped.cpu(), places)
        if (self.fan_ins(weight, dropped) > room).any():
            goes[goes.clone()] = least_of_rows(rows[goes], weight.magnitudes.cpu()[goes], room)
        return places[goes | (fan_ins[rows] == 0)]

    def grow_to(self, weight: Connections, dropped: Tensor, fan_ins: Tensor) -> Tensor:
        """Return the largest ``|dP|`` of each neuron that bring it to its fan-in when ``dropped`` are gone."""
        missing = fan_ins - self.fan_ins(weight, weight.active_indices) + self.fan_ins(weight, dropped)
        found = candidates(_neurons(weight.shape, weight.outputs), weight, missing)
        return select.largest(found, int(missing.sum()), weight.shape)[0]


def nearest(connections: int, neurons: int, least: int = 0) -> int:
    """Return the fan-in, at least 1, with which so many neurons have nearly so many connections, and ``least`` or more.

    >>> nearest(20, 6), nearest(20, 8), nearest(2, 8), nearest(0, 0)
    (3, 3, 1, 0)
    >>> nearest(20, 6, least=19)
    4
    """
    return max(1, (2 * connections + neurons) // (2 * neurons), -(-least // neurons)) if neurons else 0


def whole_fan_ins(shares: Sequence[int], neurons: Sequence[int]) -> list[int]:
    """Return the fan-in of each layer: its share of connections for each neuron, rounded up or down, but at least 1.

    What a layer gets more or less than its share is told to the next smaller one, so that the sum of all layers is off
    by no more than half the neurons of one.

    >>> whole_fan_ins([45, 14], [10, 4])  # of 4.5 and 3.5 a neuron: 62 connections for 59
    [5, 3]
    """
    found, above = [0] * len(shares), 0
    for i in sorted(range(len(shares)), key=lambda i: -neurons[i]):
        k, rest = divmod(max(shares[i], neurons[i]), neurons[i])
        found[i] = k + (rest > 0 and 2 * (rest - above) >= neurons[i])
        above += found[i] * neurons[i] - shares[i]
    return found


def least_of_rows(rows: Tensor, scores: Tensor, limits: Tensor) -> Tensor:
    """Mark the least scores of each row, as many as its limit says.

    Args:
        rows: of each score.
        scores: to compare.
        limits: of each row.

    >>> least_of_rows(torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([2, 0]))
    tensor([False,  True,  True, False])
    """
    order = scores.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=len(limits))
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]]
    marks = torch.empty(len(rows), dtype=torch.bool)
    marks[order] = rank < limits[rows[order]]
    return marks


def _neurons(shape: tuple[int, ...], outputs: Outputs) -> Tiles:
    """Return the rows of a weight as tiles."""
    return Tiles(tuple(shape), outputs, 1, None)


def _of_rows(weight: Connections, there: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``|dP|`` of inactive connections, some rows at a time, -1 in those that are not ``there``."""
    done = 0
    for first, gradients in weight.gradient_parts():
        view = parts(gradients, weight.outputs)
        here = there[done : done + len(view) * view.shape[1]].to(view.device)
        done += len(here)
        view.masked_fill_(~here.view(*view.shape[:2], *[1] * (view.ndim - 2)), -1)
        yield first, gradients.reshape(-1)
