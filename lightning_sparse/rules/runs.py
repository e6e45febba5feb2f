"""Runs: the positions of some rows of a weight, or of some columns of some rows; pure geometry.

They are runs of positions, of one length and at equal distances, numbered from 0 on. The runs of all shards of a weight
are numbered in the order of positions.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["Runs"]


class Runs:
    """The runs of one shard.

    Args:
        shape: of the weight.
        ranges: what the shard has of each dimension.
        divided: the dimensions of which some shard has a part only.
        shards: what each of them has.

    Attributes:
        begin: the first position.
        length: of each run.
        distance: from the begin of a run to that of the next one.
        numbers: those of the runs among the runs of all shards.
        total: number of the runs of all shards.

    Example:
        >>> import torch
        >>> halves = [(range(3), range(2)), (range(3), range(2, 4))]  # of the columns of three rows
        >>> runs = Runs((3, 4), halves[1], {1}, halves)
        >>> runs.positions(torch.arange(6)), runs.numbers
        (tensor([ 2,  3,  6,  7, 10, 11]), tensor([1, 3, 5]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        ranges: tuple[range, ...],
        divided: Collection[int],
        shards: Sequence[tuple[range, ...]],
    ) -> None:
        d = max(divided, default=0)
        rows, within = math.prod(shape[:d]), math.prod(shape[d + 1 :])
        self.begin = sum(r.start * math.prod(shape[i + 1 :]) for i, r in enumerate(ranges))
        self.length, self.distance = len(ranges[d]) * within, shape[d] * within
        columns = sorted({(each[d].start, each[d].stop) for each in shards})
        first = math.prod(shape[1:d]) * ranges[0].start if d else 0
        here = torch.arange(first, first + math.prod(map(len, ranges[:d])))
        self.numbers = here * len(columns) + columns.index((ranges[d].start, ranges[d].stop))
        self.total = rows * len(columns)

    def __len__(self) -> int:
        return len(self.numbers)

    def positions(self, indices: Tensor) -> Tensor:
        """Return the positions of indices, which count what lies in the runs."""
        if len(self) == 1:
            return indices + self.begin
        length = max(self.length, 1)
        return indices.div(length, rounding_mode="floor") * self.distance + indices % length + self.begin

    def has(self, positions: Tensor) -> Tensor:
        """Mark the positions that lie in the runs."""
        run, place = self.within(positions)
        return (run >= 0) & (run < len(self)) & (place < self.length)

    def indices(self, positions: Tensor) -> Tensor:
        """Return the indices of positions, all of which lie in the runs."""
        run, place = self.within(positions)
        return run * self.length + place

    def within(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the run of each position, and its place within."""
        after = positions - self.begin
        return after.div(self.distance, rounding_mode="floor"), after % self.distance

    def counts(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the run of each position, and how many there are in each run."""
        run, _ = self.within(positions)
        return run, torch.bincount(run, minlength=len(self))
