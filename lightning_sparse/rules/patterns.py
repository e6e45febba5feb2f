"""Patterns: which connections a mask may hold together, and so what is drawn, dropped and grown as one.

A criterion scores connections, a pattern says what the units are, ``select`` picks the exact number of them, and
``ties`` tells equals apart.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Generator, Tensor

from lightning_sparse.rules import ascending, sampling, select, ties
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.matrices import Outputs

__all__ = ["UNSTRUCTURED", "Pattern", "Unstructured", "first_of_rows"]


class Pattern(Protocol):
    """What a pattern decides; connections are flat positions, ascending unless said otherwise."""

    def draw(self, n: int, shape: Sequence[int], generator: Generator, nonempty: Outputs | None = None) -> Tensor:
        """Return the ``n`` connections that a weight of this ``shape`` begins with, some in each ``nonempty`` row."""

    def num_movable(self, weight: Connections) -> int:
        """Return how many connections can be dropped with others to take their places."""

    def drop(self, weight: Connections, scores: Tensor, n: int) -> Tensor:
        """Return the ``n`` active connections of least score, one score for each active one, in their order."""

    def grow_by_gradient(self, weight: Connections, n: int, dropped: Tensor) -> Tensor:
        """Return ``n`` inactive connections of largest ``|dP|``, to take the place of those ``dropped``."""

    def grow_at_random(self, weight: Connections, n: int, dropped: Tensor, generator: Generator) -> Tensor:
        """Return ``n`` inactive connections, equally likely ones, to take the place of those ``dropped``."""


class Unstructured:
    """Every connection by itself: any mask will do."""

    def draw(self, n: int, shape: Sequence[int], generator: Generator, nonempty: Outputs | None = None) -> Tensor:
        """Return ``n`` different positions, all equally likely, but one in each row that must not be empty."""
        size = math.prod(shape)
        if nonempty is None:
            return sampling.distinct(n, size, generator)
        first = sampling.one_a_row(shape, nonempty, generator)
        return ascending.merged(first, sampling.free_positions(n - len(first), first, size, generator))

    def num_movable(self, weight: Connections) -> int:
        """Return the number of free places, so that none that is dropped has to come back; or what rows can spare."""
        if weight.nonempty is None:
            return weight.num_inactive
        return max(0, min(weight.num_inactive, weight.num_active - weight.nonempty.rows(weight.shape)))

    def drop(self, weight: Connections, scores: Tensor, n: int) -> Tensor:
        """Return the ``n`` of least score, but not the largest of a row that must not be empty."""
        order = ties.at(weight.active_indices, weight.shape)
        return weight.active_indices[weight.part.lowest_positions(first_of_rows(weight, scores), n, order=order)]

    def grow_by_gradient(self, weight: Connections, n: int, dropped: Tensor) -> Tensor:
        """Return the ``n`` of largest ``|dP|``."""
        return weight.largest_gradients(n)[0]

    def grow_at_random(self, weight: Connections, n: int, dropped: Tensor, generator: Generator) -> Tensor:
        """Return ``n`` that are not active."""
        grown: Tensor = weight.part.free_positions(n, weight.active_indices.cpu(), weight.size, generator)
        return grown


def first_of_rows(weight: Connections, scores: Tensor) -> Tensor:
    """Return scores of the active connections, infinite for the largest of each row that must not be empty."""
    if weight.nonempty is None:
        return scores
    places = weight.active_indices
    dense = scores.new_full((weight.size,), -math.inf)
    dense[places] = scores
    return select.first_of_rows(dense.view(weight.shape), weight.nonempty).reshape(-1)[places]


UNSTRUCTURED: Pattern = Unstructured()
