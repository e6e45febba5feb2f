"""Shard: what a process holds of a weight that is divided over processes; see :mod:`~lightning_sparse.rules.parts`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributed

from lightning_sparse.compat.shards import Layout, is_sharded, joined
from lightning_sparse.kernels.positions import ranks
from lightning_sparse.rules import select, ties
from lightning_sparse.rules.ascending import contains, different, merged
from lightning_sparse.rules.drawn import Drawn
from lightning_sparse.rules.radix import least, ordered
from lightning_sparse.rules.runs import Runs
from lightning_sparse.rules.tiles import Tiles
from lightning_sparse.rules.whole import Whole

__all__ = ["Shard", "added"]

_AT_ONCE = 1 << 18  # numbers that are drawn to be looked through


class Shard(Whole):
    """Some rows of a weight, or some columns of some rows: runs of positions, of one length and at equal distances.

    All processes take part, those too that hold the same as another. Of these the first one counts: it is the owner.

    Args:
        layout: how the weight is divided.
        device: where its part is, and where counts are added up.
        held: see below; default: processes tell each other.

    Attributes:
        ranges: what is here of each dimension.
        held: what each process holds of each dimension.
        divided: the dimensions of which some process has a part only.
        number: that of this shard, among ``numbers`` different ones.
        is_owner: no process before this one holds the same.
        is_shared: some processes hold the same.
        runs: the positions of what is here.
    """

    least = evenly = count_global_top_k = global_top_k = ranking = None  # type: ignore[assignment]  # ask ``together``

    def __init__(self, layout: Layout, device: torch.device, held: list[tuple[range, ...]] | None = None) -> None:
        self.layout, self.shape, self.device = layout, tuple(layout.shape), device
        self.size, self.ranges = math.prod(self.shape), layout.ranges
        self.held = self._held() if held is None else held
        self._of_tiles: dict[Tiles, Shard] = {}
        self.is_owner = self.held.index(self.ranges) == distributed.get_rank()
        shards = sorted(set(self.held), key=_ends)
        self.is_shared = sum(math.prod(map(len, ranges)) for ranges in self.held) > self.size
        self.number, self.numbers = shards.index(self.ranges), len(shards)
        self.divided = {d for d, n in enumerate(self.shape) if any(len(ranges[d]) < n for ranges in shards)}
        self.runs = Runs(self.shape, self.ranges, self.divided, shards)

    def of_tiles(self, tiles: Tiles) -> "Shard":
        """Return what is here of the tiles of the weight, none of which lies on several processes."""
        if tiles not in self._of_tiles:
            stride = torch.empty(tiles.grid, device="meta").stride()
            layout = self.layout._replace(shape=torch.Size(tiles.grid), stride=stride)
            others = tuple(map(range, tiles.grid[1:]))
            held = [(range(r.start // tiles.rows, r.stop // tiles.rows), *others) for r, *_ in self.held]
            self._of_tiles[tiles] = Shard(layout, self.device, held)
        return self._of_tiles[tiles]

    def _held(self) -> list[tuple[range, ...]]:
        """Return what each process holds of each dimension."""
        table = torch.zeros(distributed.get_world_size(), 2 * len(self.shape), dtype=torch.long)
        table[distributed.get_rank()] = torch.tensor(_ends(self.ranges))
        return [
            tuple(range(*ends) for ends in zip(row[::2], row[1::2], strict=True))
            for row in added(table, self.device).tolist()
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the processes."""
        return {**self.__dict__, "layout": None, "_of_tiles": {}}

    def __eq__(self, other: object) -> bool:
        """Compare how weights are divided: the answer is the same on all processes."""
        return isinstance(other, Shard) and (self.shape, self.held) == (other.shape, other.held)

    def __hash__(self) -> int:
        return hash((self.shape, *self.held))

    # ------------------------------------------------------------------ which elements

    def positions(self, indices: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return self.runs.positions(indices)

    def here(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return positions[self.has(positions)]

    def has(self, positions: Tensor) -> Tensor:
        """Mark the positions that lie in the part."""
        return self.runs.has(positions)

    def indices(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return self.runs.indices(positions)

    def length(self, size: int) -> int:  # noqa: D102  (inherited)
        return len(self.runs) * self.runs.length

    def shape_here(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return tuple(map(len, self.ranges))

    def shape_of(self, part: Tensor) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self.shape

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of a tensor of the weight's shape, or of its first dimensions; also of a divided one."""
        if is_sharded(x):
            part: Tensor = x.to_local()  # type: ignore[attr-defined]
            return part
        return x[tuple(slice(r.start, r.stop) for r in self.ranges[: x.ndim])]

    def joined(self, part: Tensor) -> Tensor:
        """Return the DTensor of which this is the part.

        Raises:
            RuntimeError: the part has been copied or pickled without the processes.
        """
        if self.layout is None:
            raise RuntimeError("This copy has no processes that hold the other parts. Ask the callback of the fit.")
        return joined(part, self.layout)

    # ------------------------------------------------------------------ what all parts have together

    def sums(self, x: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return added(x if self.is_owner else torch.zeros_like(x), self.device)

    def total(self, *counts: int) -> list[int]:  # noqa: D102  (inherited)
        found: list[int] = self.sums(torch.tensor(counts, dtype=torch.long)).tolist()
        return found

    def all(self, holds: bool) -> bool:  # noqa: D102  (inherited)
        return not self.any(int(not holds))

    def any(self, count: int) -> bool:  # noqa: D102  (inherited)
        return self.total(count) > [0]

    def all_equal(self, scores: Tensor) -> bool:  # noqa: D102  (inherited)
        lows, highs, lengths = self._of_each(scores)
        return bool(lengths.sum() > 1) and bool(lows.min() == highs.max())

    def extremes(self, x: Tensor) -> tuple[float, float]:  # noqa: D102  (inherited)
        lows, highs, _ = self._of_each(x)
        return float(lows.min()), float(highs.max())

    def _of_each(self, x: Tensor) -> Tensor:
        """Return the least number of each shard, the largest, and whether it has none, one, or several: 0 to 2."""
        low, high = x.aminmax() if x.numel() else (torch.tensor(torch.inf), torch.tensor(-torch.inf))
        ends = torch.zeros(self.numbers, 3, dtype=torch.float64)
        ends[self.number] = torch.tensor([float(low), float(high), min(x.numel(), 2)], dtype=torch.float64)
        return self.sums(ends).T

    def _before(self, counts: Tensor) -> tuple[Tensor, int]:
        """Return how many of something lie before each run, and how many there are; ``counts``: of each run."""
        table = torch.zeros(self.runs.total, dtype=torch.int32 if self.size < 1 << 31 else torch.int64)
        table[self.runs.numbers] = counts.to(table.dtype)
        of_runs = self.sums(table).long()
        upto = of_runs.cumsum(0)
        return (upto - of_runs)[self.runs.numbers], int(upto[-1])

    def _places(self, positions: Tensor) -> tuple[Tensor, int]:
        """Return the places of ascending positions among those of all parts, and how many these are."""
        run, counts = self.runs.counts(positions)
        before, total = self._before(counts)
        shifts = before - (counts.cumsum(0) - counts)
        return torch.arange(len(positions)) + shifts[run], total

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

    def largest(  # type: ignore[override]
        self, blocks: Iterable[tuple[int, Tensor]], k: int, shape: Sequence[int], at_least: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return the positions here of the ``k`` largest scores of all, given in blocks; see ``select.largest``."""
        scores = torch.cat([block for _, block in blocks])
        among = scores >= at_least
        found = self.top_k_positions(scores, min(k, self.total(select.count(among))[0]), among)
        return self.positions(found).cpu(), scores[found].cpu()

    def numbered(self, indices: Tensor) -> Tensor:
        """Return numbers that differ from those of other parts: an order for equals of which any will do."""
        return indices * self.numbers + self.number

    # ------------------------------------------------------------------ what is drawn

    def num_free(self, taken: Tensor, size: int) -> int:  # noqa: D102  (inherited)
        return size - self.total(len(taken))[0]

    def distinct(self, n: int, below: int, generator: Generator) -> Tensor:  # noqa: D102  (inherited)
        return self._distinct(n, below, generator, self.has)

    def free_positions(self, n: int, taken: Tensor, size: int, generator: Generator) -> Tensor:
        """Draw ``n`` different positions that are not ``taken``, ascending here; return those that are here."""
        free = self.runs.length - self.runs.counts(taken)[1]
        before, total = self._before(free)
        if not 0 <= n <= total:
            raise ValueError(f"{n} connections were asked for, {total} are free.")
        places = self._distinct(n, total, generator, lambda numbers: _within(numbers, before, free)[1])
        shifts = (free.cumsum(0) - free) - before  # from places among all free ones to those among the free ones here
        places += shifts[_within(places, before, free)[0]]
        free_before = torch.arange(len(taken)).neg_().add_(self.indices(taken))
        return self.positions(places + ranks(free_before, places, right=True))

    def drawn(self, n: int, taken: Tensor, size: int) -> Drawn:  # noqa: D102  (inherited)
        return _DrawnHere(self, taken)

    def places(self, n: int, room: int, generator: Generator) -> Tensor:  # noqa: D102  (inherited)
        lengths = torch.tensor([room])
        before, total = self._before(lengths)
        return self._distinct(n, total, generator, lambda numbers: _within(numbers, before, lengths)[1]) - before

    def rand(self, shape: Sequence[int], generator: Generator) -> Tensor:  # noqa: D102  (inherited)
        kept = [
            numbers[self.has(torch.arange(first, first + len(numbers)))]
            for first, numbers in _in_turn(self.size, lambda n: torch.rand(n, generator=generator))
        ]
        return torch.cat(kept).view(*shape)

    def drawn_for(self, positions: Tensor, draw: Callable[[int], Tensor]) -> Tensor:  # noqa: D102  (inherited)
        places, total = self._places(positions.cpu())
        return draw(total)[places]

    def taken(self, positions: Tensor, places: Tensor) -> Tensor:  # noqa: D102  (inherited)
        own, _ = self._places(positions.cpu())
        return positions[torch.isin(own, places).to(positions.device)]

    def _distinct(self, n: int, below: int, generator: Generator, kept: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw what ``sampling.distinct`` draws; return those that ``kept`` marks, ascending, and hold no others."""
        if 2 * n >= below:
            chosen = torch.randperm(below, generator=generator, dtype=self._permuted(below))[:n]
            return torch.cat([part[kept(part)] for part in torch.split(chosen, _AT_ONCE)]).long().sort().values
        found, held = torch.empty(0, dtype=torch.long), 0
        while held < n:
            for _, numbers in _in_turn(n - held, lambda m: torch.randint(below, (m,), generator=generator)):
                new = different(numbers[kept(numbers)])
                found = merged(found, new[~contains(found, new)])
            (held,) = self.total(len(found))
        return found

    @staticmethod
    def _permuted(below: int) -> torch.dtype:
        """Return the smallest dtype of a permutation, which is the same in each."""
        return torch.int32 if below < 1 << 31 else torch.int64


class _DrawnHere:
    """Those of a growing set of positions that lie in a part; see ``sampling.Drawn``."""

    def __init__(self, part: Shard, taken: Tensor) -> None:
        self._part, self._used, self.positions = part, taken, taken.new_empty(0)

    @property
    def count(self) -> int:
        return self._part.total(len(self.positions))[0]

    def add(self, positions: Tensor) -> None:
        self._add(different(self._part.here(positions)))

    def add_first(self, positions: Tensor, n: int) -> None:
        turns = select.positions(self._part.has(positions))
        values, order = positions[turns].sort(stable=True)
        new = ~contains(self._used, values)
        new[1:] &= values[1:] != values[:-1]
        turns, values = turns[order[new]], values[new]
        (there_are,) = self._part.total(len(turns))
        (first,) = least([turns.int()], [min(n, there_are)], [[]], self._part.sums)
        self._add(values[first])

    def _add(self, positions: Tensor) -> None:
        new = positions[~contains(self._used, positions)]
        self._used, self.positions = merged(self._used, new), merged(self.positions, new)


def _ends(ranges: Sequence[range]) -> list[int]:
    return [end for each in ranges for end in (each.start, each.stop)]


def added(x: Tensor, device: torch.device) -> Tensor:
    """Return the sums of numbers over all processes; may write into ``x``."""
    sums = x.to(device)
    distributed.all_reduce(sums)
    return sums.to(x.device)


def _within(numbers: Tensor, begins: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stretch in which each number lies, and whether it lies in one; stretches are in ascending order."""
    if not len(begins):
        return torch.zeros_like(numbers, dtype=torch.long), torch.zeros_like(numbers, dtype=torch.bool)
    stretch = torch.searchsorted(begins, numbers.to(begins.dtype), right=True).sub_(1).clamp_(min=0)
    place = numbers - begins[stretch]
    return stretch, (place >= 0) & (place < lengths[stretch])


def _in_turn(n: int, draw: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first, and the next of ``n`` numbers, which are those of one draw."""
    for first in range(0, n, _AT_ONCE):
        yield first, draw(min(_AT_ONCE, n - first))
