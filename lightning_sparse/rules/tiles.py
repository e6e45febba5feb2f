"""Tiles: a weight divided into equal parts, rectangles of outputs by inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sparse.rules.matrices import Outputs, parts

__all__ = ["Tiles"]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a weight. They are counted as the elements of a weight ``(out / rows, in / columns, *kernel)``.

    Inputs are the input channels of a convolution, at each place of the kernel by itself.

    Attributes:
        shape: of the weight.
        outputs: where its outputs lie.
        rows: number of outputs of a tile.
        columns: number of inputs of a tile; None: all, at all places of the kernel, so that a tile is a row.

    >>> tiles = Tiles((2, 4), Outputs(), rows=2, columns=2)
    >>> tiles.size, tiles.grid, tiles.members(torch.tensor([1]))
    (4, (1, 2), tensor([[2, 3, 6, 7]]))
    """

    shape: tuple[int, ...]
    outputs: Outputs
    rows: int
    columns: int | None

    @cached_property
    def _view(self) -> Tensor:
        """The weight as ``(groups, out / groups, in / groups, *kernel)``, without memory."""
        return parts(torch.empty(self.shape, device="meta"), self.outputs)

    @property
    def misfit(self) -> str | None:
        """Why the weight cannot be divided into such tiles; None: it can."""
        view = self._view
        if view.ndim < 3 or (view.ndim > 3 and view.stride(-1) != 1):
            return "not a matrix of outputs and inputs"
        _, out, inputs, *_ = view.shape
        if out % self.rows:
            return f"{out} outputs, no multiple of {self.rows}"
        if self.columns is not None and inputs % self.columns:
            return f"{inputs} inputs, no multiple of {self.columns}"
        return None

    @cached_property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Numbers of groups, of outputs and inputs of each, and of places of the kernel."""
        groups, out, inputs, *kernel = self._view.shape
        return groups, out, inputs, math.prod(kernel)

    @cached_property
    def _strides(self) -> tuple[int, int, int, int]:
        """What the flat position of a connection grows by, along each of ``_sizes``."""
        groups, out, inputs = self._view.stride()[:3]
        return groups, out, inputs, 1

    @property
    def grid(self) -> tuple[int, ...]:
        """How many tiles there are along the outputs, the inputs and the kernel."""
        groups, out, inputs, *kernel = self._view.shape
        down = groups * out // self.rows
        return (down, 1) if self.columns is None else (down, inputs // self.columns, *kernel)

    @property
    def size(self) -> int:
        """Number of connections of a tile."""
        _, _, inputs, kernel = self._sizes
        return self.rows * (inputs * kernel if self.columns is None else self.columns)

    # ------------------------------------------------------------------ positions

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return group, output and input in it, and place in the kernel of each flat position of the weight."""
        pairs = zip(self._strides, self._sizes, strict=True)
        return tuple(positions.div(stride, rounding_mode="floor") % size for stride, size in pairs)

    def of(self, positions: Tensor) -> Tensor:
        """Return the tile of each flat position of the weight."""
        g, o, i, k = self.coordinates(positions)
        _, out, inputs, kernel = self._sizes
        down = o.div(self.rows, rounding_mode="floor").add_(g, alpha=out // self.rows)
        if self.columns is None:
            return down
        across = i.div(self.columns, rounding_mode="floor")
        return down.mul_(inputs // self.columns).add_(across).mul_(kernel).add_(k)

    def members(self, tiles: Tensor) -> Tensor:
        """Return the flat positions of the connections of each tile: ``(n, size)``."""
        _, out, inputs, kernel = self._sizes
        of_group, of_output, of_input, _ = self._strides
        if self.columns is None:
            down, first = tiles, torch.zeros_like(tiles)
            along = [(self.rows, of_output), (inputs, of_input), (kernel, 1)]
        else:
            across = inputs // self.columns
            down = tiles.div(across * kernel, rounding_mode="floor")
            column = tiles.div(kernel, rounding_mode="floor") % across
            first = column * (self.columns * of_input) + tiles % kernel
            along = [(self.rows, of_output), (self.columns, of_input)]
        per_group = out // self.rows
        first = (
            first + down.div(per_group, rounding_mode="floor") * of_group + down % per_group * (self.rows * of_output)
        )
        offsets = torch.zeros(1, dtype=torch.long)
        for size, stride in along:
            offsets = (offsets[:, None] + torch.arange(size) * stride).view(-1)
        return first[:, None] + offsets.to(tiles.device)

    # ------------------------------------------------------------------ tensors of the weight's shape

    def pool_rows(self, x: Tensor) -> Tensor:
        """Return sums over the inputs of each tile, of the weight or some of its rows, in at least float32.

        Their shape is ``(groups, out / groups, in / columns, *kernel)``.
        """
        x, dtype = parts(x, self.outputs), torch.promote_types(x.dtype, torch.float32)
        if self.columns is None:
            return x.sum(tuple(range(2, x.ndim)), dtype=dtype).unsqueeze(2)
        return torch.unflatten(x, 2, (-1, self.columns)).sum(3, dtype=dtype)

    def pool_outputs(self, x: Tensor) -> Tensor:
        """Return sums over the outputs of each tile, of what ``pool_rows`` has returned: of the shape ``grid``."""
        return torch.unflatten(x, 1, (-1, self.rows)).sum(2).flatten(0, 1)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum of each tile, of the shape ``grid``, in at least float32.

        >>> Tiles((2, 4), Outputs(), 1, 2).sums(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
        tensor([[ 3.,  7.],
                [11., 15.]])
        """
        return self.pool_outputs(self.pool_rows(x))

    def means(self, x: Tensor) -> Tensor:
        """Return the mean of each tile, of the shape ``grid``, in at least float32."""
        return self.sums(x).div_(self.size)

    def first(self, mask: Tensor) -> Tensor:
        """Return whether the first connection of each tile is active: a boolean tensor of the shape ``grid``."""
        view = parts(mask, self.outputs)
        if self.columns is None:
            return view.flatten(2)[:, :: self.rows, :1].flatten(0, 1)
        return view[:, :: self.rows, :: self.columns].flatten(0, 1)

    def whole(self, mask: Tensor) -> Tensor:
        """Return the mask of the weight in which the tiles are active that ``mask``, of the shape ``grid``, says."""
        full = torch.empty(self.shape, dtype=torch.bool, device=mask.device)
        view = torch.unflatten(parts(full, self.outputs), 1, (-1, self.rows))
        groups, down = view.shape[:2]
        if self.columns is None:
            view.copy_(mask.view(groups, down, *[1] * (view.ndim - 2)))
        else:
            torch.unflatten(view, 3, (-1, self.columns)).copy_(
                mask.view(groups, down, 1, mask.shape[1], 1, *mask.shape[2:])
            )
        return full

    def fits(self, mask: Tensor) -> bool:
        """Tell whether each tile is active as a whole or not at all."""
        return torch.equal(self.whole(self.first(mask)), mask)

    def largest_of_each(self, scores: Tensor, limits: Tensor, order: Callable[[], Tensor]) -> Tensor:
        """Mark so many of the largest scores of each tile, which is of one row, as ``limits`` says.

        Args:
            scores: ``(groups, out, in, *kernel)``; what is -inf is not marked, and NaN is larger than any number.
            limits: ``(groups, out, in / columns, *kernel)``; of whole rows, ``(groups, out, 1)``.
            order: returns numbers of the shape of ``scores``, of which the least win among equals; asked if it matters.
        """
        tiled, limits = self._tiled(scores), limits.to(scores.device).unsqueeze(3)
        if self.columns is None:  # most of a long row is below the limit
            values, ranked = tiled.topk(min(tiled.shape[3], int(limits.max()) + 1), dim=3)
        else:
            values, ranked = tiled.sort(dim=3, descending=True, stable=True)
        if _is_undecided(values, limits):
            ranked = self._tiled(order()).argsort(3)
            ranked = ranked.gather(3, tiled.gather(3, ranked).sort(dim=3, descending=True, stable=True).indices)
        places = torch.arange(ranked.shape[3], device=scores.device).view(-1, *[1] * (tiled.ndim - 4))
        marks = torch.zeros_like(tiled, dtype=torch.bool)
        marks.scatter_(3, ranked, (places < limits).expand_as(ranked))
        return marks.logical_and_(tiled != -math.inf).view(scores.shape)

    def _tiled(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(groups, out, in, *kernel)`` with the members of a tile of one row along dimension 3."""
        if self.columns is None:
            return x.flatten(2).unsqueeze(2)
        return torch.unflatten(x, 2, (-1, self.columns))


def _is_undecided(values: Tensor, limits: Tensor) -> bool:
    """Tell whether, of values that descend along dimension 3, the last within the limit equals the first beyond it."""
    size = values.shape[3]
    limits = limits.expand(*values.shape[:3], 1, *values.shape[4:])
    last, beyond = (values.gather(3, at.clamp(0, size - 1)) for at in (limits - 1, limits))
    inside = (limits > 0) & (limits < size) & (beyond != -math.inf)
    return bool(((last == beyond) & inside).any())
