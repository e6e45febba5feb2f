"""Whole: all of a weight, as one process has it; see :mod:`~lightning_sparse.rules.parts` for parts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_sparse.rules import ranking, sampling, select, ties
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.even import evenly
from lightning_sparse.rules.sampling import Everywhere
from lightning_sparse.rules.tiles import Tiles

__all__ = ["WHOLE", "Together", "Whole"]


class Together:
    """Several weights, of which all is here: what is counted in all of them, and how they compete."""

    def total(self, *counts: int) -> list[int]:
        """Return the sums of counts over all parts; of several weights, one for each."""
        return [*counts]

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums of numbers over all parts."""
        return x

    def all(self, holds: bool) -> bool:
        """Tell whether all processes say so."""
        return holds

    def any(self, count: int) -> bool:
        """Tell whether some process has any of what is counted."""
        return count > 0

    def least(self, x: float) -> float:
        """Return the least of the numbers that the processes have, one each."""
        return x

    def evenly(self, counts: Sequence[int], k: int) -> Tensor:
        """Return ``k`` of the places of several lists, one after the other, that are spread evenly; see ``evenly``.

        Args:
            counts: how many elements of each list are here.
            k: how many; if there are fewer, all.

        Returns:
            Their places among those that are here, ascending.
        """
        return evenly(sum(counts), k)

    def count_global_top_k(
        self,
        tensors: Iterable[Tensor],
        k: int,
        among: Sequence[Tensor] | None,
        at_least: Sequence[int] | None = None,
        score: select.Score = torch.Tensor.detach,
    ) -> list[int]:
        """Return how many of the ``k`` largest scores lie in each weight; see ``select.count_global_top_k``."""
        return select.count_global_top_k(tensors, k, among, at_least, score)

    def global_top_k(self, scores: Sequence[Tensor], k: int, orders: Sequence[ties.Order]) -> list[Tensor]:
        """Return where the ``k`` largest scores of all weights together are; see ``select.global_top_k``."""
        return select.global_top_k(scores, k, orders)

    def ranking(self, weights: Sequence[Connections], k: int, at_least: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the ``k`` inactive connections of largest ``|dP|`` of all weights; see ``ranking.ranking``."""
        return ranking.ranking(weights, k, at_least)


class Whole(Together, Everywhere):
    """All of a weight, or of several: on one process, or the same on each of several."""

    # ------------------------------------------------------------------ which elements

    def positions(self, indices: Tensor) -> Tensor:
        """Return the flat positions in the weight of flat indices of the part."""
        return indices

    def here(self, positions: Tensor) -> Tensor:
        """Return those of ascending positions that lie in the part."""
        return positions

    def indices(self, positions: Tensor) -> Tensor:
        """Return the flat indices in the part of positions, all of which lie in it."""
        return positions

    def length(self, size: int) -> int:
        """Return how many elements the part has of a weight of this ``size``."""
        return size

    def shape_here(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of a weight of this ``shape``."""
        return tuple(shape)

    def of_tiles(self, tiles: Tiles) -> "Whole":
        """Return what is here of the tiles of the weight."""
        return self

    def shape_of(self, part: Tensor) -> tuple[int, ...]:
        """Return the shape of the weight of which this is the part."""
        return tuple(part.shape)

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of a tensor of the weight's shape, or of its first dimensions."""
        return x

    def joined(self, part: Tensor) -> Tensor:
        """Return the tensor of which this is the part: a DTensor if there are others."""
        return part

    # ------------------------------------------------------------------ what all parts have together

    def all_equal(self, scores: Tensor) -> bool:
        """Tell whether all parts have the same score, and there are several; see ``select.all_equal``."""
        return select.all_equal(scores)

    def extremes(self, x: Tensor) -> tuple[float, float]:
        """Return the least and the largest of the numbers that all parts have, of which there are some."""
        low, high = x.aminmax()
        return float(low), float(high)

    # ------------------------------------------------------------------ which are chosen

    top_k_positions = staticmethod(select.top_k_positions)
    lowest_positions = staticmethod(select.lowest_positions)

    def top_k(self, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Mark exactly the ``k`` largest scores of the weight; see ``select.top_k``."""
        return select.top_k(scores, k, among)

    largest = staticmethod(select.largest)

    # ------------------------------------------------------------------ what is drawn

    def places(self, n: int, room: int, generator: Generator) -> Tensor:
        """Draw ``n`` different ones of the places that all parts, of whole rows, have one after the other.

        Args:
            n: how many.
            room: number of places that this part has.
            generator: on the CPU.

        Returns:
            Those that are here, ascending, counted from the first one here.
        """
        return sampling.distinct(n, room, generator)

    def distinct(self, n: int, below: int, generator: Generator) -> Tensor:
        """Draw ``n`` different positions of a weight of size ``below``, and return those that lie in the part."""
        return sampling.distinct(n, below, generator)

    def rand(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Draw a number from 0 to 1 for each element of the weight; return those of the part, which has a shape."""
        return torch.rand(*shape, generator=generator)

    def drawn_for(self, positions: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw for a list of ascending positions, one by one; return what is for those in the part, ``positions``."""
        return draw(len(positions))

    def taken(self, positions: Tensor, places: Tensor) -> Tensor:
        """Return those in the part of some ascending positions, given by their places in the list of all of them.

        Args:
            positions: those of the list that lie in the part.
            places: which are returned, in any order.
        """
        return positions[places.to(positions.device)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Stay the one object that it is where it is pickled or copied."""
        return "WHOLE" if type(self) is Whole else super().__reduce_ex__(protocol)


WHOLE = Whole()
