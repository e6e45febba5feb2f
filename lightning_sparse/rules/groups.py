"""Groups of M neighbouring inputs of an output, of which a number each is active, drawn or of largest score."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from lightning_sparse.rules import ties
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.matrices import parts
from lightning_sparse.rules.parts import Whole
from lightning_sparse.rules.tiles import Tiles

__all__ = ["Groups", "candidates", "largest_of_each"]


class Groups:
    """The groups of a weight that are here: all of them, or those of the rows that a process holds.

    Args:
        tiles: the groups of the whole weight.
        part: what is here of it.

    Attributes:
        first_position: flat position of the first connection that is here.
    """

    def __init__(self, tiles: Tiles, part: Whole) -> None:
        self.tiles, self._part = tiles, part
        self._number = part.length(math.prod(tiles.shape)) // tiles.size
        self.first_position = int(part.positions(torch.tensor(0)))
        self._first = int(tiles.of(torch.tensor(self.first_position))) if self._number else 0

    def counts(self, positions: Tensor) -> Tensor:
        """Return how many of some flat positions that are here are in each group: ``(groups,)``, on the CPU."""
        return torch.bincount(self.tiles.of(positions.cpu()) - self._first, minlength=self._number)

    def drawn(self, n: int, room: Tensor, taken: Tensor, generator: Generator) -> Tensor:
        """Draw ``n`` positions that are not ``taken``, of each group at most its ``room``; return those here."""
        places = self._part.places(n, int(room.sum()), generator)
        of_places = torch.searchsorted(room.cumsum(0), places, right=True)
        chosen, counts = torch.unique_consecutive(of_places, return_counts=True)
        members = self.tiles.members(chosen + self._first)
        m, dtype = self.tiles.size, torch.float32  # whatever the precision
        keys = self._part.drawn_for(members[:, 0], lambda k: torch.rand(k, m, generator=generator, dtype=dtype))
        keys.masked_fill_(torch.isin(members, taken), 2)
        nearest = members.gather(1, keys.argsort(1))
        return nearest[torch.arange(m) < counts[:, None]].sort().values


def largest_of_each(groups: Tiles, scores: Tensor, limits: Tensor, first: int = 0) -> Tensor:
    """Mark the largest scores of each group, as many as its limit says.

    Args:
        groups: of the weight.
        scores: of the weight, or of some of its rows; -inf is never marked.
        limits: one for each of these groups.
        first: flat position of the first score.
    """
    outputs, shape = groups.outputs, scores.shape
    view = parts(scores, outputs)

    def order() -> Tensor:
        positions = torch.arange(first, first + scores.numel(), device=scores.device)
        return parts(ties.spread(positions, groups.shape).view(shape), outputs)

    marks = torch.empty(shape, dtype=torch.bool, device=scores.device)
    grid = (1,) if groups.columns is None else (view.shape[2] // groups.columns, *view.shape[3:])
    limits = limits.view(*view.shape[:2], *grid)
    parts(marks, outputs).copy_(groups.largest_of_each(view, limits, order))
    return marks


def candidates(groups: Tiles, weight: Connections, room: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``|dP|`` of inactive connections, some rows at a time, and -1 where their groups have room for larger ones.

    Each part is flat and comes after the position where it begins.
    """
    done = 0
    for first, gradients in weight.gradient_parts():
        limits = room[done : done + gradients.numel() // groups.size]
        done += len(limits)
        inactive = gradients.masked_fill(gradients < 0, -math.inf)
        marks = largest_of_each(groups, inactive, limits, first)
        yield first, gradients.masked_fill_(~marks, -1).reshape(-1)
