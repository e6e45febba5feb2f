"""Parts: what a process holds of a weight, and how connections are chosen among all parts of it together.

One process is the case of one part: it holds all, and has nothing to ask. Where processes hold some rows each, as with
FSDP2, they choose the same connections as one process would: each counts its own, counts are added up
(:mod:`~lightning_sparse.rules.radix`), and no process sees the others' values or positions. All of them call these
functions at the same time with the same numbers, and each gets what lies in its own rows.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor, distributed

from lightning_sparse.compat.shards import Layout, is_sharded, joined, layout, local
from lightning_sparse.kernels.positions import ranks
from lightning_sparse.rules import ranking, sampling, select, ties
from lightning_sparse.rules.ascending import contains, different, merged
from lightning_sparse.rules.budgets import apportion
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.drawn import Drawn
from lightning_sparse.rules.even import evenly, fractions
from lightning_sparse.rules.radix import kth, least, ordered
from lightning_sparse.rules.sampling import Everywhere

__all__ = ["WHOLE", "Rows", "Whole", "divided_as", "part_of", "together"]

_AT_ONCE = 1 << 18  # numbers that are drawn to be looked through


class Whole(Everywhere):
    """All of a weight: on one process, or the same on each of several."""

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

    def shape_of(self, part: Tensor) -> tuple[int, ...]:
        """Return the shape of the weight of which this is the part."""
        return tuple(part.shape)

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of a tensor of the weight's shape."""
        return x

    def joined(self, part: Tensor) -> Tensor:
        """Return the tensor of which this is the part: a DTensor if there are others."""
        return part

    # ------------------------------------------------------------------ what all parts have together

    def total(self, *counts: int) -> list[int]:
        """Return the sums of counts over all parts."""
        return [*counts]

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums of numbers over all parts."""
        return x

    def least(self, x: float) -> float:
        """Return the least of the numbers that the parts have, one each."""
        return x

    def all(self, holds: bool) -> bool:
        """Tell whether all parts say so."""
        return holds

    def any(self, count: int) -> bool:
        """Tell whether some part has any of what is counted."""
        return count > 0

    def all_equal(self, scores: Tensor) -> bool:
        """Tell whether all parts have the same score, and there are several; see ``select.all_equal``."""
        return select.all_equal(scores)

    # ------------------------------------------------------------------ which are chosen

    top_k_positions = staticmethod(select.top_k_positions)
    lowest_positions = staticmethod(select.lowest_positions)
    count_global_top_k = staticmethod(select.count_global_top_k)
    global_top_k = staticmethod(select.global_top_k)
    ranking = staticmethod(ranking.ranking)

    def top_k(self, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Mark exactly the ``k`` largest scores of the weight; see ``select.top_k``."""
        return select.top_k(scores, k, among)

    def evenly(self, counts: Sequence[int], k: int) -> Tensor:
        """Return ``k`` of the places of several lists, one after the other, that are spread evenly; see ``evenly``.

        Args:
            counts: how many elements of each list are in the part.
            k: how many; if there are fewer, all.

        Returns:
            Their places among those of the part, ascending.
        """
        return evenly(sum(counts), k)

    # ------------------------------------------------------------------ what is drawn

    def distinct(self, n: int, below: int, generator: Generator) -> Tensor:
        """Draw ``n`` different positions of a weight of size ``below``, and return those that lie in the part."""
        return sampling.distinct(n, below, generator)

    def rand(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Draw a number from 0 to 1 for each element of the weight; return those of the part, which has a shape."""
        return torch.rand(*shape, generator=generator)

    def drawn_for(self, n: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw for the elements of a list, of which ``n`` are in the part, one by one."""
        return draw(n)

    def taken(self, x: Tensor, indices: Tensor) -> Tensor:
        """Return elements of a list, of which the part has ``x``, by their places in the whole list."""
        return x[indices.to(x.device)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Stay the one object that it is where it is pickled or copied."""
        return "WHOLE" if type(self) is Whole else super().__reduce_ex__(protocol)


WHOLE = Whole()


class Rows(Whole):
    """Some rows of a weight, one after the other; the processes of a group hold the others, in their order.

    Args:
        layout: how the weight is divided.
        device: where its part is, and where counts are added up.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.shape, self.device = layout, tuple(layout.shape), device
        self.group: Any = layout.mesh.get_group()
        self.rank, self.world = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        rows = -(-self.shape[0] // self.world)  # of all but the last ones, as torch.chunk divides
        self.rows = range(*(min(n * rows, self.shape[0]) for n in (self.rank, self.rank + 1)))
        self.begin, self.end = (n * math.prod(self.shape[1:]) for n in (self.rows.start, self.rows.stop))
        self.size = math.prod(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the processes."""
        return {**self.__dict__, "layout": None, "group": None}

    def __eq__(self, other: object) -> bool:
        """Compare which rows of which weight these are."""
        return isinstance(other, Rows) and (self.shape, self.rows) == (other.shape, other.rows)

    def __hash__(self) -> int:
        return hash((self.shape, self.rows))

    # ------------------------------------------------------------------ which elements

    def positions(self, indices: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return indices + self.begin

    def here(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return positions[(positions >= self.begin) & (positions < self.end)]

    def indices(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return positions - self.begin

    def length(self, size: int) -> int:  # noqa: D102  (inherited)
        return self.end - self.begin

    def shape_of(self, part: Tensor) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self.shape

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of a tensor of the weight's shape, also of one that is divided in the same way."""
        if is_sharded(x):
            part: Tensor = x.to_local()  # type: ignore[attr-defined]
            return part
        return x[self.rows.start : self.rows.stop]

    def joined(self, part: Tensor) -> Tensor:
        """Return the DTensor of which this is the part.

        Raises:
            RuntimeError: the part has been copied or pickled without the processes.
        """
        if self.layout is None:
            raise RuntimeError("This copy has no processes that hold the other rows. Ask the callback of the fit.")
        return joined(part, self.layout)

    # ------------------------------------------------------------------ what all parts have together

    def sums(self, x: Tensor) -> Tensor:  # noqa: D102  (inherited)
        added = x.to(self.device)
        distributed.all_reduce(added, group=self.group)
        return added.to(x.device)

    def total(self, *counts: int) -> list[int]:  # noqa: D102  (inherited)
        found: list[int] = self.sums(torch.tensor(counts)).tolist()
        return found

    def least(self, x: float) -> float:  # noqa: D102  (inherited)
        return float(self._table([x]).min())

    def _table(self, own: Sequence[float]) -> Tensor:
        """Return the numbers that each process has, ``(processes, numbers)``."""
        table = torch.zeros(self.world, len(own), dtype=torch.float64)
        table[self.rank] = torch.tensor(own, dtype=torch.float64)
        return self.sums(table)

    def evenly(self, counts: Sequence[int], k: int) -> Tensor:  # noqa: D102  (inherited)
        numbers = self._table(counts).long()
        before = numbers.sum(0).cumsum(0) - numbers.sum(0) + numbers[: self.rank].sum(0)
        here = torch.cat([torch.arange(n) + first for n, first in zip(counts, before.tolist(), strict=True)])
        (marks,) = least([ordered(fractions(here))], [min(k, int(numbers.sum()))], [[lambda i: here[i]]], self.sums)
        return select.positions(marks)

    def all(self, holds: bool) -> bool:  # noqa: D102  (inherited)
        return self.total(int(holds)) == [self.world]

    def any(self, count: int) -> bool:  # noqa: D102  (inherited)
        return self.total(count) > [0]

    def all_equal(self, scores: Tensor) -> bool:  # noqa: D102  (inherited)
        low, high = scores.aminmax() if scores.numel() else (torch.tensor(torch.inf), torch.tensor(-torch.inf))
        several = float(scores.numel()) if scores.numel() < 2 else 2.0
        lows, highs, numbers = self._table([float(low), float(high), several]).T
        return bool(numbers.sum() > 1) and bool(lows.min() == highs.max())

    def _before(self, count: int) -> tuple[int, int]:
        """Return how many the processes before this one have in all, and how many all have."""
        counts = self.total(*(count if rank == self.rank else 0 for rank in range(self.world)))
        upto = [0, *accumulate(counts)]
        return upto[self.rank], upto[-1]

    # ------------------------------------------------------------------ which are chosen

    def top_k_positions(  # type: ignore[override]  # noqa: D102  (inherited)
        self, scores: Tensor, k: int, among: Tensor | None = None, order: ties.Order | None = None
    ) -> Tensor:
        return self._extreme(scores, k, among, order, largest=True)

    def lowest_positions(  # type: ignore[override]  # noqa: D102  (inherited)
        self, scores: Tensor, k: int, among: Tensor | None = None, order: ties.Order | None = None
    ) -> Tensor:
        return self._extreme(scores, k, among, order, largest=False)

    def top_k(self, scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:  # noqa: D102  (inherited)
        marks = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        marks[self.top_k_positions(scores, k, among)] = True
        return marks.view(scores.shape)

    def count_global_top_k(  # type: ignore[override]  # noqa: D102  (inherited)
        self,
        tensors: Sequence[Tensor],
        k: int,
        among: Sequence[Tensor],
        at_least: Sequence[int] | None = None,
        score: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    ) -> list[int]:
        sure = [0] * len(among) if at_least is None else [*at_least]
        extra = k - sum(sure)
        if extra == 0:
            return sure
        keys = [~ordered(score(x).reshape(-1)[select.positions(a)]) for x, a in zip(tensors, among, strict=True)]
        if any(sure):
            marks = least(keys, sure, [[self._numbered]] * len(keys), self.sums)
            keys = [key[~mark] for key, mark in zip(keys, marks, strict=True)]
        (bound,) = kth([torch.cat(keys)], [extra], self.sums)
        tied = [] if bound.tied is None else [select.count(key == bound.tied) for key in keys]
        won, equal = [select.count(key <= bound.last) for key in keys], tied
        counts = self.total(*won, *equal)
        won, equal = counts[: len(keys)], counts[len(keys) :]
        shares = apportion(bound.missing, equal, equal) if equal else [0] * len(keys)
        return [least_ + more + share for least_, more, share in zip(sure, won, shares, strict=True)]

    def global_top_k(  # type: ignore[override]  # noqa: D102  (inherited)
        self,
        scores: Sequence[Tensor],
        k: int,
        among: Sequence[Tensor],
        at_least: Sequence[int],
        orders: Sequence[ties.Order],
    ) -> list[Tensor]:
        counts = self.count_global_top_k(scores, k, among, at_least)
        found = []
        for each, n, candidates, order in zip(scores, counts, among, orders, strict=True):
            marks = torch.zeros_like(each, dtype=torch.bool)
            marks.view(-1)[self.top_k_positions(each, n, candidates, order)] = True
            found.append(marks)
        return found

    def ranking(  # type: ignore[override]  # noqa: D102  (inherited)
        self, weights: Sequence[Connections], k: int, at_least: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        extra = k - sum(at_least)
        held = [w.largest_gradients(min(n + extra, w.num_inactive)) for w, n in zip(weights, at_least, strict=True)]
        keys = [~ordered(gradients) for _, gradients in held]
        spreads = [ties.at(found, weight.shape) for weight, (found, _) in zip(weights, held, strict=True)]
        won = least(keys, at_least, [[order] for order in spreads], self.sums)
        rest = [select.positions(~marks) for marks in won]
        ends = torch.tensor([len(each) for each in rest]).cumsum(0)
        firsts = [0, *accumulate(weight.size for weight in weights)]

        def by_layer(indices: Tensor, of: Callable[[int, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
            owners, found = torch.searchsorted(ends, indices, right=True), torch.empty(len(indices), dtype=dtype)
            for owner, left in enumerate(rest):
                own = owners == owner
                found[own] = of(owner, left[indices[own] - (ends[owner] - len(left))]).to(dtype)
            return found

        def share(owner: int, indices: Tensor) -> Tensor:
            return spreads[owner](indices).double() / weights[owner].size

        def position(owner: int, indices: Tensor) -> Tensor:
            return held[owner][0][indices] + firsts[owner]

        orders = [
            lambda indices: by_layer(indices, share, torch.float64),
            lambda indices: by_layer(indices, position, torch.long),
        ]
        left = torch.cat([key[indices] for key, indices in zip(keys, rest, strict=True)])
        (best,) = least([left], [extra], [orders], self.sums)
        for marks, indices, others in zip(won, rest, best.tensor_split(ends[:-1]), strict=True):
            marks[indices[others]] = True
        return [(found[marks], gradients[marks]) for (found, gradients), marks in zip(held, won, strict=True)]

    def _extreme(self, scores: Tensor, k: int, among: Tensor | None, order: ties.Order | None, largest: bool) -> Tensor:
        """Return the flat indices, ascending, of those of the ``k`` largest (or smallest) scores that are here."""
        flat = scores.reshape(-1)
        candidates = None if among is None else select.positions(among)
        keys = ordered(flat if candidates is None else flat[candidates])
        rank = order or (lambda indices: ties.spread(self.positions(indices), self.shape))

        def place(indices: Tensor) -> Tensor:
            numbers = rank(indices if candidates is None else candidates[indices])
            return self._short(numbers if largest else ~numbers)

        (marks,) = least([~keys if largest else keys], [k], [[place]], self.sums)
        found = select.positions(marks)
        return found if candidates is None else candidates[found]

    def _short(self, numbers: Tensor) -> Tensor:
        """Return whole numbers below the weight's size in as few bits as they need: fewer rounds."""
        return numbers.int() if self.size < 1 << 31 else numbers

    def _numbered(self, indices: Tensor) -> Tensor:
        """Return numbers that differ on all processes: an order for equals of which any will do."""
        return indices * self.world + self.rank

    # ------------------------------------------------------------------ what is drawn

    def num_free(self, taken: Tensor, size: int) -> int:  # noqa: D102  (inherited)
        return size - self.total(len(taken))[0]

    def distinct(self, n: int, below: int, generator: Generator) -> Tensor:  # noqa: D102  (inherited)
        return self._distinct(n, below, generator, range(self.begin, self.end))

    def free_positions(self, n: int, taken: Tensor, size: int, generator: Generator) -> Tensor:
        """Draw ``n`` different positions that are not ``taken``, ascending here; return those that are here."""
        here = self.end - self.begin - len(taken)
        before, free = self._before(here)
        if not 0 <= n <= free:
            raise ValueError(f"{n} connections were asked for, {free} are free.")
        places = self._distinct(n, free, generator, range(before, before + here)) - before  # among the free ones here
        free_before = torch.arange(len(taken)).neg_().add_(taken - self.begin)
        return places.add_(ranks(free_before, places, right=True)).add_(self.begin)

    def drawn(self, n: int, taken: Tensor, size: int) -> Drawn:  # noqa: D102  (inherited)
        return _DrawnHere(self, taken)

    def rand(self, shape: Sequence[int], generator: Generator) -> Tensor:  # noqa: D102  (inherited)
        kept = [
            numbers[max(0, self.begin - first) : max(0, self.end - first)]
            for first, numbers in _in_turn(self.size, lambda n: torch.rand(n, generator=generator))
        ]
        return torch.cat(kept).view(*shape)

    def drawn_for(self, n: int, draw: Callable[[int], Tensor]) -> Tensor:  # noqa: D102  (inherited)
        before, total = self._before(n)
        return draw(total)[before : before + n]

    def taken(self, x: Tensor, indices: Tensor) -> Tensor:  # noqa: D102  (inherited)
        before, _ = self._before(len(x))
        own = indices.to(x.device) - before
        return x[own[(own >= 0) & (own < len(x))]]

    def _distinct(self, n: int, below: int, generator: Generator, kept: range) -> Tensor:
        """Draw what ``sampling.distinct`` draws; return those in ``kept``, ascending. Memory goes with these."""
        if 2 * n >= below:
            chosen = torch.randperm(below, generator=generator, dtype=self._permuted(below))[:n]
            return chosen[(chosen >= kept.start) & (chosen < kept.stop)].long().sort().values
        found, held = torch.empty(0, dtype=torch.long), 0
        while held < n:
            for _, numbers in _in_turn(n - held, lambda m: torch.randint(below, (m,), generator=generator)):
                new = different(numbers[(numbers >= kept.start) & (numbers < kept.stop)])
                found = merged(found, new[~contains(found, new)])
            (held,) = self.total(len(found))
        return found

    @staticmethod
    def _permuted(below: int) -> torch.dtype:
        """Return the smallest dtype of a permutation, which is the same in each."""
        return torch.int32 if below < 1 << 31 else torch.int64


class _DrawnHere:
    """Those of a growing set of positions that lie in some rows; see ``sampling.Drawn``."""

    def __init__(self, rows: Rows, taken: Tensor) -> None:
        self._rows, self._used, self.positions = rows, taken, taken.new_empty(0)

    @property
    def count(self) -> int:
        return self._rows.total(len(self.positions))[0]

    def add(self, positions: Tensor) -> None:
        self._add(different(self._rows.here(positions)))

    def add_first(self, positions: Tensor, n: int) -> None:
        rows = self._rows
        turns = select.positions((positions >= rows.begin) & (positions < rows.end))
        values, order = positions[turns].sort(stable=True)
        new = ~contains(self._used, values)
        new[1:] &= values[1:] != values[:-1]
        turns, values = turns[order[new]], values[new]
        (there_are,) = rows.total(len(turns))
        (first,) = least([turns.int()], [min(n, there_are)], [[]], rows.sums)
        self._add(values[first])

    def _add(self, positions: Tensor) -> None:
        new = positions[~contains(self._used, positions)]
        self._used, self.positions = merged(self._used, new), merged(self.positions, new)


def part_of(parameter: Any) -> Whole:
    """Return what this process holds of a parameter."""
    return Rows(layout(parameter), local(parameter).device) if is_sharded(parameter) else WHOLE


def divided_as(x: Tensor, like: Any) -> Tensor:
    """Return a tensor, which is whole or divided already, in the parts that another one of its shape is in."""
    return joined(part_of(like).cut(x), layout(like)) if is_sharded(like) else x


def together(weights: Sequence[Any]) -> Whole:
    """Return the part that answers for several weights: they are divided over the same processes."""
    part: Whole = weights[0].part if weights else WHOLE
    return part


def _in_turn(n: int, draw: Callable[[int], Tensor]) -> Any:
    """Yield the number of the first, and the next of ``n`` numbers, which are those of one draw."""
    for first in range(0, n, _AT_ONCE):
        yield first, draw(min(_AT_ONCE, n - first))
