"""Units: a weight whose connections are blocks or rows of another weight's, whole or absent.

So a method that drops, grows and counts connections does the same with blocks, and its numbers are whole blocks.
Decision: the magnitude of a block is the mean of those of its members, and so is its gradient. In a layer that is the
order of their sums; between layers, whose rows may differ in length, it tells what a connection is worth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.rules.tiles import Tiles
from lightning_sparse.weights.base import Weight, new_version
from lightning_sparse.weights.masked import MaskedWeight

__all__ = ["Units", "units"]


def units(weights: Sequence[Weight], pattern: Pattern) -> list[Weight]:
    """Return weights whose connections are the units of a pattern: the weights themselves if these are single ones."""
    found = [(weight, pattern.units(weight.shape, weight.outputs)) for weight in weights]
    return [weight if tiles is None else Units(weight, tiles) for weight, tiles in found]


class Units(Weight):
    """A view of a weight whose connections are tiles; it lives as long as an update.

    Attributes:
        whole: the weight.
        tiles: its units.
        buffers: of the method, the mean magnitude of each unit.
    """

    def __init__(self, whole: Weight, tiles: Tiles) -> None:
        self._whole, self.tiles = whole, tiles
        self.part = whole.part.of_tiles(tiles)
        self._tiles_here = replace(tiles, shape=whole.part.shape_here(tiles.shape))
        self.name, self.parameter, self.optimizer = whole.name, whole.parameter, whole.optimizer
        self.buffers = {key: self._tiles_here.means(buffer.abs()) for key, buffer in whole.buffers.items()}
        self.nonempty = None if whole.nonempty is None else FIRST
        self.mask_version = new_version()

    @property
    def whole(self) -> Weight:  # noqa: D102  (inherited)
        return self._whole

    # ------------------------------------------------------------------ which connections

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self.tiles.grid

    @property
    def num_active(self) -> int:  # noqa: D102  (inherited)
        return self.whole.num_active // self.tiles.size

    @property
    def mask(self) -> Tensor:  # noqa: D102  (inherited)
        return self._tiles_here.first(self.whole.mask)

    @property
    def active_indices(self) -> Tensor:  # noqa: D102  (inherited)
        return self._members[0]

    @property
    def _members(self) -> tuple[Tensor, Tensor]:
        """Active units, and an order of the active connections in which those of a unit lie together."""
        if self._found is None or self._found[0] != self.whole.mask_version:
            of, order = self.tiles.of(self.whole.active_indices).sort(stable=True)
            self._found = self.whole.mask_version, (of[:: self.tiles.size], order)
        return self._found[1]

    _found: tuple[int, tuple[Tensor, Tensor]] | None = None

    def hold_indices(self) -> None:  # noqa: D102  (inherited)
        self.whole.hold_indices()

    def forget_indices(self) -> None:  # noqa: D102  (inherited)
        self._found = None
        self.whole.forget_indices()

    # ------------------------------------------------------------------ what they hold

    @property
    def given(self) -> Tensor:
        """The mean ``|W|`` of each unit of the weight that the module has, before ``start``."""
        return self._tiles_here.means(self.whole.given.abs())

    @property
    def W(self) -> Tensor:
        """The mean ``|W|`` of each unit."""
        assert isinstance(self.whole, MaskedWeight)
        return self._tiles_here.means(self.whole.W.abs())

    @property
    def finite(self) -> bool:  # noqa: D102  (inherited)
        return self.whole.finite

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self._means(self.whole.magnitudes)

    @property
    def gradient_magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self._means(self.whole.gradient_magnitudes)

    def _means(self, values: Tensor) -> Tensor:
        """Return the means over units of what there is of each active connection."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        return exact[self._members[1]].view(-1, self.tiles.size).mean(1)

    @cached_property
    def _gradients(self) -> Tensor:
        """The mean ``|dP|`` of inactive units; of active ones 0."""
        rows = [self._tiles_here.pool_rows(gradients.clamp_(min=0)) for _, gradients in self.whole.gradient_parts()]
        return self._tiles_here.pool_outputs(torch.cat(rows, 1)).div_(self.tiles.size)

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return the mean ``|dP|`` of some inactive units."""
        return self._gradients.view(-1)[self.part.indices(positions).to(self._gradients.device)]

    def sample_inactive(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        inactive = ~self.mask.view(-1)[::stride].to(self._gradients.device)
        return self._gradients.view(-1)[::stride][inactive]

    def gradient_parts(self) -> Iterator[tuple[int, Tensor]]:  # noqa: D102  (inherited)
        first = int(self.part.positions(torch.tensor(0)))
        yield first, self._gradients.masked_fill(self.mask.to(self._gradients.device), -1)

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        parts = ((first, gradients.view(-1)) for first, gradients in self.gradient_parts())
        return self.part.largest(parts, n, self.shape, at_least)

    # ------------------------------------------------------------------ how they move

    def _positions(self, units: Tensor) -> Tensor:
        """Return the flat positions of the members of some units, ascending."""
        return self.tiles.members(units).view(-1).sort().values

    def start(self, positions: Tensor, generator: Generator) -> None:  # noqa: D102  (inherited)
        self.whole.start(self._positions(positions), generator)

    def scale_to_fan_in_(self) -> None:  # noqa: D102  (inherited)
        self.whole.scale_to_fan_in_()

    def rewire(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move units; ``value`` is one number for all their members."""
        self.whole.rewire(self._positions(dropped), self._positions(grown), value)
        self.forget_indices()

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        self.whole.keep(self._tiles_here.whole(mask))
        self.forget_indices()

    def keep_zeros(self) -> None:  # noqa: D102  (inherited)
        self.whole.keep_zeros()

    def keep_zero_gradients(self) -> None:  # noqa: D102  (inherited)
        self.whole.keep_zero_gradients()

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:  # noqa: D102  (inherited)
        return self.whole.state()

    def detach(self) -> None:  # noqa: D102  (inherited)
        self.whole.detach()
