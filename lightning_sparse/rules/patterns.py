"""Patterns: which connections a mask may hold together, and so what is drawn, dropped and grown as one.

A criterion scores connections, a pattern says what the units are, ``select`` picks the exact number of them, and
``ties`` tells equals apart.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Generator, Tensor

from lightning_sparse.rules import sampling, select, ties
from lightning_sparse.rules.criteria import Connections

__all__ = ["UNSTRUCTURED", "Pattern", "Unstructured"]


class Pattern(Protocol):
    """What a pattern decides; connections are flat positions, ascending unless said otherwise."""

    def draw(self, n: int, shape: Sequence[int], generator: Generator) -> Tensor:
        """Return the ``n`` connections that a weight of this ``shape`` begins with."""

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

    def draw(self, n: int, shape: Sequence[int], generator: Generator) -> Tensor:
        """Return ``n`` different positions, all equally likely."""
        return sampling.distinct(n, math.prod(shape), generator)

    def num_movable(self, weight: Connections) -> int:
        """Return the number of free places, so that none that is dropped has to come back."""
        return weight.num_inactive

    def drop(self, weight: Connections, scores: Tensor, n: int) -> Tensor:
        """Return the ``n`` of least score."""
        order = ties.at(weight.active_indices, weight.shape)
        return weight.active_indices[select.lowest_positions(scores, n, order=order)]

    def grow_by_gradient(self, weight: Connections, n: int, dropped: Tensor) -> Tensor:
        """Return the ``n`` of largest ``|dP|``."""
        return weight.largest_gradients(n)[0]

    def grow_at_random(self, weight: Connections, n: int, dropped: Tensor, generator: Generator) -> Tensor:
        """Return ``n`` that are not active."""
        return sampling.free_positions(n, weight.active_indices.cpu(), weight.size, generator)


UNSTRUCTURED: Pattern = Unstructured()
