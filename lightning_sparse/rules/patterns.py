"""Patterns: which connections a mask may hold together, and so what is drawn, dropped and grown as one.

A criterion scores connections, a pattern says what the units are, ``select`` picks the exact number of them, and
``ties`` tells equals apart. There are two kinds of patterns. Blocks and rows are units of several connections, which
are active as a whole or not at all: what follows then sees a weight whose connections are these units
(:class:`~lightning_sparse.weights.units.Units`). ``N:M`` keeps single connections, but at most N in each group of M.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from lightning_sparse.rules import ascending, sampling, select, ties
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.groups import Groups, candidates, largest_of_each
from lightning_sparse.rules.matrices import FIRST, Outputs, parts
from lightning_sparse.rules.parts import WHOLE, Whole, together
from lightning_sparse.rules.tiles import Tiles

__all__ = [
    "UNSTRUCTURED",
    "Blocks",
    "Laid",
    "NOfM",
    "Pattern",
    "Sized",
    "check_pattern",
    "first_of_rows",
    "named",
    "other_rows",
]


class Laid(Protocol):
    """What groups of inputs depend on."""

    @property
    def outputs(self) -> Outputs:
        """Where the layer's outputs lie."""

    @property
    def part(self) -> Any:
        """What is here of the weight."""


class Sized(Protocol):
    """What numbers of connections depend on."""

    @property
    def outputs(self) -> Outputs:
        """Where the layer's outputs lie."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    def size(self) -> int:
        """Number of connections there might be."""


class Pattern:
    """What a pattern decides. This one is unstructured: every connection by itself, so that any mask will do.

    Connections are flat positions, ascending unless said otherwise.
    """

    @property
    def kind(self) -> str:
        """``"unstructured"``, ``"N:M"``, ``"block"``, ``"row"`` or ``"fan-in"``."""
        return "unstructured"

    @property
    def density(self) -> float:
        """The largest density that it allows."""
        return 1.0

    def misfit(self, shape: tuple[int, ...], outputs: Outputs, nonempty: Outputs | None) -> str | None:
        """Return why a weight cannot have it; None: it can."""
        return None

    def units(self, shape: tuple[int, ...], outputs: Outputs) -> Tiles | None:
        """Return the tiles of a weight that are its units; None: these are single connections."""
        return None

    def fits(self, mask: Tensor, outputs: Outputs) -> bool:
        """Tell whether a mask is one of the pattern."""
        return True

    def capacity(self, weight: Sized) -> int:
        """Return how many connections a weight has at most."""
        return weight.size

    def at_least(self, weight: Sized, n: int) -> int:
        """Return the smallest number of connections, ``n`` or more, that a weight may begin with."""
        return n

    def counts(self, weights: Sequence[Sized], shares: Sequence[int]) -> list[int]:
        """Return how many connections weights begin with: their shares, or what is near them that they can have."""
        return list(shares)

    def draw(
        self,
        n: int,
        shape: tuple[int, ...],
        generator: Generator,
        nonempty: Outputs | None = None,
        outputs: Outputs = FIRST,
        part: Whole = WHOLE,
    ) -> Tensor:
        """Return those in a part of the ``n`` connections that a weight of this ``shape`` begins with.

        They are equally likely, but one is in each row that must not be empty, of a whole weight.
        """
        size = math.prod(shape)
        if nonempty is None:
            return part.distinct(n, size, generator)
        first = sampling.one_a_row(shape, nonempty, generator)
        return ascending.merged(first, sampling.free_positions(n - len(first), first, size, generator))

    def top_k(self, weight: Connections, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Mark the ``k`` of largest score; see ``select.top_k``."""
        marked: Tensor = weight.part.top_k(scores, k, among)
        return marked

    def count_global_top_k(
        self,
        weights: Sequence[Connections],
        tensors: Sequence[Tensor],
        k: int,
        among: Sequence[Tensor],
        at_least: Sequence[int],
        score: select.Score = torch.Tensor.detach,
    ) -> list[int]:
        """Return how many of the ``k`` of largest score lie in each weight; see ``select.count_global_top_k``."""
        return together(weights).count_global_top_k(tensors, k, among, at_least, score)

    def num_movable(self, weight: Connections) -> int:
        """Return how many connections can be dropped with others to take their places, and rows keep what they must."""
        if weight.nonempty is None:
            return weight.num_inactive
        return max(0, min(weight.num_inactive, weight.num_active - weight.nonempty.rows(weight.shape)))

    def drop(self, weight: Connections, scores: Tensor, n: int) -> Tensor:
        """Return the ``n`` active connections of least score, but not the largest of a row that must not be empty.

        There is one score for each active one, in their order.
        """
        order = ties.at(weight.active_indices, weight.shape)
        lowest = weight.part.lowest_positions(first_of_rows(weight, scores), n, order=order)
        return weight.active_indices.index_select(0, lowest)

    def grow_by_gradient(self, weight: Connections, n: int, dropped: Tensor) -> Tensor:
        """Return ``n`` inactive connections of largest ``|dP|``, to take the place of those ``dropped``."""
        return weight.largest_gradients(n)[0]

    def grow_at_random(self, weight: Connections, n: int, dropped: Tensor, generator: Generator) -> Tensor:
        """Return ``n`` inactive connections, equally likely ones, to take the place of those ``dropped``."""
        grown: Tensor = weight.part.free_positions(n, weight.active_indices.cpu(), weight.size, generator)
        return grown


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``rows`` outputs by ``columns`` inputs, each whole or absent; ``columns=None``: whole rows."""

    rows: int
    columns: int | None

    @property
    def kind(self) -> str:
        """``"row"`` or ``"block"``."""
        return "row" if self.columns is None else "block"

    def misfit(self, shape: tuple[int, ...], outputs: Outputs, nonempty: Outputs | None) -> str | None:
        """Return why a weight cannot be divided into the blocks."""
        return other_rows(outputs, nonempty) or Tiles(shape, outputs, self.rows, self.columns).misfit

    def units(self, shape: tuple[int, ...], outputs: Outputs) -> Tiles | None:
        """Return the blocks of a weight."""
        return Tiles(shape, outputs, self.rows, self.columns)

    def fits(self, mask: Tensor, outputs: Outputs) -> bool:
        """Tell whether all blocks are whole or absent."""
        return Tiles(tuple(mask.shape), outputs, self.rows, self.columns).fits(mask)


@dataclass(frozen=True)
class NOfM(Pattern):
    """At most ``n`` of every ``m`` neighbouring inputs of an output; of a convolution, at each place of the kernel.

    Where a method still has more connections than that, as gradual pruning has, those that are not among the ``n``
    largest of their group come last.
    """

    n: int
    m: int

    @property
    def kind(self) -> str:
        """``"N:M"``."""
        return "N:M"

    @property
    def density(self) -> float:
        """``N / M``."""
        return self.n / self.m

    def misfit(self, shape: tuple[int, ...], outputs: Outputs, nonempty: Outputs | None) -> str | None:
        """Return why the inputs of a weight cannot be divided into groups of ``m``."""
        return other_rows(outputs, nonempty) or Tiles(shape, outputs, 1, self.m).misfit

    def fits(self, mask: Tensor, outputs: Outputs) -> bool:
        """Tell whether no group has more than ``n``."""
        return bool((Tiles(tuple(mask.shape), outputs, 1, self.m).sums(mask) <= self.n).all())

    def capacity(self, weight: Sized) -> int:
        """Return ``N / M`` of the size of the weight."""
        return weight.size // self.m * self.n

    def draw(
        self,
        n: int,
        shape: tuple[int, ...],
        generator: Generator,
        nonempty: Outputs | None = None,
        outputs: Outputs = FIRST,
        part: Whole = WHOLE,
    ) -> Tensor:
        """Return those in a part of ``n`` positions: each of the N places that a group has is equally likely."""
        groups = Groups(Tiles(shape, outputs, 1, self.m), part)
        first = torch.empty(0, dtype=torch.long)
        if nonempty is not None:
            first = sampling.one_a_row(shape, nonempty, generator)
        return ascending.merged(first, groups.drawn(n - len(first), self.n - groups.counts(first), first, generator))

    def top_k(self, weight: Laid, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Mark the ``k`` of largest score among the ``n`` largest of each group; if these are fewer, others as well."""
        part: Whole = weight.part
        first = self.largest(weight, scores, among)
        rest = k - part.total(select.count(first))[0]
        if rest <= 0:
            return part.top_k(scores, k, first)
        return first | part.top_k(scores, rest, ~first if among is None else among & ~first)

    def maxima(self, weight: Laid, scores: Tensor) -> Tensor:
        """Return the largest score of each group, at all of its places, in the order of memory of ``scores``."""
        found = torch.empty_like(scores)
        groups, each = (torch.unflatten(parts(x, weight.outputs), 2, (-1, self.m)) for x in (scores, found))
        each.copy_(groups.amax(3, keepdim=True).expand_as(each))
        return found

    def count_global_top_k(
        self,
        weights: Sequence[Connections],
        tensors: Sequence[Tensor],
        k: int,
        among: Sequence[Tensor],
        at_least: Sequence[int],
        score: select.Score = torch.Tensor.detach,
    ) -> list[int]:
        """Return how many lie in each weight of the ``k`` that ``top_k`` would mark in all weights together."""
        each, all_parts = zip(weights, tensors, among, strict=True), together(weights)
        first = [self.largest(weight, score(tensor), candidates) for weight, tensor, candidates in each]
        counts = all_parts.total(*(select.count(mask) for mask in first))
        if k <= sum(counts):
            return all_parts.count_global_top_k(tensors, k, first, at_least, score)
        others = [candidates & ~mask for candidates, mask in zip(among, first, strict=True)]
        least = [max(0, n - count) for n, count in zip(at_least, counts, strict=True)]
        more = all_parts.count_global_top_k(tensors, k - sum(counts), others, least, score)
        return [count + n for count, n in zip(counts, more, strict=True)]

    def num_movable(self, weight: Connections) -> int:
        """Return how many can go so that all their groups can take others, and rows keep what they must."""
        part: Whole = weight.part
        active = self._groups(weight).counts(weight.active_indices)
        (movable,) = part.total(int(active.minimum(self.m - active).sum()))
        if weight.nonempty is None:
            return movable
        rows = weight.nonempty.rows(weight.shape)
        return max(0, min(movable, weight.num_active) - rows)

    def drop(self, weight: Connections, scores: Tensor, n: int) -> Tensor:
        """Return the ``n`` of least score, but of no group more than there are inactive ones to take their places."""
        if 2 * self.n <= self.m:  # then there always are
            return super().drop(weight, scores, n)
        scores = first_of_rows(weight, scores).nan_to_num(nan=math.inf, posinf=math.inf)
        places, groups, part = weight.active_indices, self._groups(weight), weight.part
        indices = part.indices(places)
        dense = scores.new_full(part.shape_here(weight.shape), -math.inf)
        dense.view(-1)[indices] = -scores
        limits = (self.m - groups.counts(places)).to(dense.device)
        droppable = largest_of_each(groups.tiles, dense, limits, groups.first_position).view(-1)[indices]
        droppable &= scores != math.inf
        order = ties.at(places, weight.shape)
        return places[part.lowest_positions(scores, n, droppable, order)]

    def grow_by_gradient(self, weight: Connections, n: int, dropped: Tensor) -> Tensor:
        """Return the ``n`` of largest ``|dP|`` that groups have room for once others are ``dropped``."""
        part: Whole = weight.part
        groups = self._groups(weight)
        room = self._room(groups, weight, dropped)
        return part.largest(candidates(groups.tiles, weight, room), n, weight.shape)[0]

    def grow_at_random(self, weight: Connections, n: int, dropped: Tensor, generator: Generator) -> Tensor:
        """Return ``n``: each place that a group has once others are ``dropped`` is equally likely to be taken."""
        groups = self._groups(weight)
        return groups.drawn(n, self._room(groups, weight, dropped), weight.active_indices.cpu(), generator)

    def _groups(self, weight: Connections) -> Groups:
        return Groups(Tiles(weight.shape, weight.outputs, 1, self.m), weight.part)

    def _room(self, groups: Groups, weight: Connections, dropped: Tensor) -> Tensor:
        """Return how many each group can take once others are ``dropped``, which do not come back at once.

        A group that still has more than N may have back as many as it loses.
        """
        active = groups.counts(weight.active_indices)
        room = (self.n - active).clamp_(min=0).add_(groups.counts(dropped))
        return room.minimum(self.m - active)

    def largest(self, weight: Laid, scores: Tensor, among: Tensor | None = None) -> Tensor:
        """Mark the ``n`` largest of each group, of what is here of the weight."""
        groups = Tiles(weight.part.shape_of(scores), weight.outputs, 1, self.m)
        first = int(weight.part.positions(torch.tensor(0)))
        limits = torch.full((scores.numel() // self.m,), self.n)
        scores = scores if among is None else scores.masked_fill(~among, -math.inf)
        return largest_of_each(groups, scores, limits, first)


def other_rows(outputs: Outputs, nonempty: Outputs | None) -> str | None:
    """Return why a pattern cannot keep rows from being empty; None: it can."""
    return None if nonempty in (None, outputs) else "divided by norms along another dimension than its outputs"


def first_of_rows(weight: Connections, scores: Tensor) -> Tensor:
    """Return scores of the active connections, infinite for the largest of each row that must not be empty."""
    if weight.nonempty is None:
        return scores
    places = weight.active_indices
    dense = scores.new_full((weight.size,), -math.inf)
    dense[places] = scores
    return select.first_of_rows(dense.view(weight.shape), weight.nonempty).reshape(-1)[places]


UNSTRUCTURED = Pattern()


# ---------------------------------------------------------------------- names

_N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")
_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")


def named(name: str) -> Pattern:
    """Return the pattern of a name.

    >>> named("2:4"), named("block:16x8"), named("row")
    (NOfM(n=2, m=4), Blocks(rows=16, columns=8), Blocks(rows=1, columns=None))

    Raises:
        ValueError: there is none of this name.
    """
    if name == "unstructured":
        return UNSTRUCTURED
    if name == "row":
        return Blocks(1, None)
    if isinstance(name, str) and (block := _BLOCK.fullmatch(name)):
        return Blocks(*map(int, block.groups()))
    if isinstance(name, str) and (numbers := _N_OF_M.fullmatch(name)):
        n, m = map(int, numbers.groups())
        if n < m:
            return NOfM(n, m)
    raise ValueError(
        f'pattern must be "unstructured", "N:M" with N below M such as "2:4", "block:RxC" such as "block:16x16", or '
        f'"row", got {name!r}.'
    )


def check_pattern(pattern: str) -> None:
    """Raise unless it is the name of a pattern."""
    named(pattern)
