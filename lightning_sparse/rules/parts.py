"""Parts: what a process holds of a weight, and how connections are chosen among all parts of it together.

One process is the case of one part: it holds all, and has nothing to ask. Where processes hold some rows or columns
each, as with FSDP2 and tensor parallelism, they choose the same connections as one process would: each counts its own,
counts are added up (:mod:`~lightning_sparse.rules.radix`), and no process sees the others' values or positions. All of
them call these functions at the same time with the same numbers, and each gets what lies in its own part.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_sparse.compat.shards import is_sharded, joined, layout, local
from lightning_sparse.rules import select, ties
from lightning_sparse.rules.budgets import apportion
from lightning_sparse.rules.criteria import Connections
from lightning_sparse.rules.even import fractions
from lightning_sparse.rules.radix import kth, least, ordered
from lightning_sparse.rules.shard import Shard, added
from lightning_sparse.rules.whole import WHOLE, Together, Whole

__all__ = ["WHOLE", "Shard", "Together", "Whole", "divided_as", "part_of", "together"]


class _Shards(Together):
    """Several weights, of each of which this process has a part.

    Args:
        parts: those of the weights, in the order in which these are given to the functions.
    """

    def __init__(self, parts: Sequence[Shard]) -> None:
        self.parts, self.owned = parts, [part.is_owner for part in parts]

    def sums(self, x: Tensor) -> Tensor:
        return added(x, self.parts[0].device)

    def total(self, *counts: int) -> list[int]:
        if any(part.is_shared for part in self.parts):
            counts = tuple(count if own else 0 for count, own in zip(counts, self.owned, strict=True))
        found: list[int] = self.sums(torch.tensor(counts, dtype=torch.long)).tolist()
        return found

    def all(self, holds: bool) -> bool:
        return not self.any(int(not holds))

    def any(self, count: int) -> bool:
        return bool(self.sums(torch.tensor([count])) > 0)

    def least(self, x: float) -> float:
        return float(self._table([x]).min())

    def _table(self, own: Sequence[float]) -> Tensor:
        """Return the numbers that each process has, ``(processes, numbers)``."""
        table = torch.zeros(distributed.get_world_size(), len(own), dtype=torch.float64)
        table[distributed.get_rank()] = torch.tensor(own, dtype=torch.float64)
        return self.sums(table)

    def evenly(self, counts: Sequence[int], k: int) -> Tensor:
        numbers, rank = self._table(counts).long(), distributed.get_rank()
        before = numbers.sum(0).cumsum(0) - numbers.sum(0) + numbers[:rank].sum(0)
        here = torch.cat([torch.arange(n) + first for n, first in zip(counts, before.tolist(), strict=True)])
        (marks,) = least([ordered(fractions(here))], [min(k, int(numbers.sum()))], [[lambda i: here[i]]], self.sums)
        return select.positions(marks)

    def count_global_top_k(
        self,
        tensors: Iterable[Tensor],
        k: int,
        among: Sequence[Tensor] | None,
        at_least: Sequence[int] | None = None,
        score: select.Score = torch.Tensor.detach,
    ) -> list[int]:
        sure = [0] * len(self.parts) if at_least is None else [*at_least]
        extra = k - sum(sure)
        if extra == 0:
            return sure
        scores = [score(x).reshape(-1) for x in tensors]
        if among is not None:
            scores = [each[select.positions(marks)] for each, marks in zip(scores, among, strict=True)]
        keys = [~ordered(each) for each in scores]
        if any(sure):
            marks = least(keys, sure, [[part.numbered] for part in self.parts], self.sums, self._counted(keys))
            keys = [key[~mark] for key, mark in zip(keys, marks, strict=True)]
        owned = [key for key, own in zip(keys, self.owned, strict=True) if own] or [keys[0][:0]]
        (bound,) = kth([torch.cat(owned)], [extra], self.sums)
        won = self.total(*(select.count(key <= bound.last) for key in keys))
        equal = [0] * len(keys)
        if bound.tied is not None:
            equal = self.total(*(select.count(key == bound.tied) for key in keys))
        shares = apportion(bound.missing, equal, equal) if bound.missing else equal
        return [least_ + more + share for least_, more, share in zip(sure, won, shares, strict=True)]

    def global_top_k(self, scores: Sequence[Tensor], k: int, orders: Sequence[ties.Order]) -> list[Tensor]:
        counts = self.count_global_top_k(scores, k, None)
        each = zip(self.parts, scores, counts, orders, strict=True)
        return [part.top_k_positions(own, n, order=order) for part, own, n, order in each]

    def ranking(self, weights: Sequence[Connections], k: int, at_least: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        extra = k - sum(at_least)
        held = [w.largest_gradients(min(n + extra, w.num_inactive)) for w, n in zip(weights, at_least, strict=True)]
        keys = [~ordered(gradients) for _, gradients in held]
        counted = self._counted(keys)
        spreads = [ties.at(found, weight.shape) for weight, (found, _) in zip(weights, held, strict=True)]
        won = least(keys, at_least, [[order] for order in spreads], self.sums, counted)
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
        left, counts = (
            torch.cat([x[indices] for x, indices in zip(each, rest, strict=True)]) for each in (keys, counted)
        )
        (best,) = least([left], [extra], [orders], self.sums, [counts])
        for marks, indices, others in zip(won, rest, best.tensor_split(ends[:-1]), strict=True):
            marks[indices[others]] = True
        return [(found[marks], gradients[marks]) for (found, gradients), marks in zip(held, won, strict=True)]

    def _counted(self, keys: Sequence[Tensor]) -> list[Tensor]:
        """Return which of a list for each weight count here, and not on another process that has the same."""
        return [torch.full_like(key, own, dtype=torch.bool) for key, own in zip(keys, self.owned, strict=True)]


def together(weights: Sequence[Any]) -> Together:
    """Return what answers for several weights: either all of them are whole, or all are divided over processes."""
    parts = [weight.part for weight in weights]
    return _Shards(parts) if parts and isinstance(parts[0], Shard) else WHOLE


def part_of(parameter: Any) -> Whole:
    """Return what this process holds of a parameter."""
    return Shard(layout(parameter), local(parameter).device) if is_sharded(parameter) else WHOLE


def divided_as(x: Tensor, like: Any) -> Tensor:
    """Return a tensor, which is whole or divided already, in the parts that another one of its shape is in."""
    return joined(part_of(like).cut(x), layout(like)) if is_sharded(like) else x
