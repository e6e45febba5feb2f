"""The different positions among those that were drawn, in marks for all there might be, or in lists of those there are.

Marks are quicker where many are drawn, but take memory in proportion to the weight.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightning_sparse.kernels.positions import mark_
from lightning_sparse.rules import select
from lightning_sparse.rules.ascending import contains, different, merged

__all__ = ["Drawn", "drawn"]

_MARKED = 32  # marks for each position that is taken or will be drawn take no more memory than vectors of these


class Drawn(Protocol):
    """A growing set of positions."""

    @property
    def count(self) -> int:
        """Number of positions in the set."""

    @property
    def positions(self) -> Tensor:
        """The set, ascending; nothing can be added any more."""

    def add(self, positions: Tensor) -> None:
        """Add those that are not taken."""

    def add_first(self, positions: Tensor, n: int) -> None:
        """Add the first ``n`` of those that are neither taken nor in the set."""


def drawn(n: int, taken: Tensor, size: int) -> Drawn:
    """Return an empty set of positions below ``size``.

    Args:
        n: how many it will have.
        taken: positions that it cannot have, ascending.
        size: of the weight.
    """
    return _Marked(taken, size) if size <= _MARKED * (n + len(taken)) else _Listed(taken)


class _Marked:
    def __init__(self, taken: Tensor, size: int) -> None:
        self._taken, self.count = taken, 0
        self._marks = torch.zeros(size, dtype=torch.bool)
        mark_(self._marks, taken)

    @property
    def positions(self) -> Tensor:
        return select.positions(self._marks.index_fill_(0, self._taken, False))

    def add_first(self, positions: Tensor, n: int) -> None:
        self.add(_first_occurrences(positions[~self._marks[positions]])[:n])

    def add(self, positions: Tensor) -> None:
        self.count += mark_(self._marks, positions)


class _Listed:
    def __init__(self, taken: Tensor) -> None:
        self._used, self.positions = taken, taken.new_empty(0)

    @property
    def count(self) -> int:
        return len(self.positions)

    def add_first(self, positions: Tensor, n: int) -> None:
        ascending, order = positions.sort()
        used = torch.empty(len(order), dtype=torch.bool).index_copy_(0, order, contains(self._used, ascending))
        self.add(_first_occurrences(positions[~used])[:n])

    def add(self, positions: Tensor) -> None:
        positions = different(positions)
        new = positions[~contains(self._used, positions)]
        self._used, self.positions = merged(self._used, new), merged(self.positions, new)


def _first_occurrences(x: Tensor) -> Tensor:
    """Leave out what was there before; the order stays."""
    values, order = x.sort(stable=True)
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    return x[order[new].sort().values]
