"""What compiled convolutions read to make what: the places of the numbers that are packed for them.

A *line* is one number of as many images as a register holds, side by side. Images are read and made in *bands* of rows,
as many at once as stay in the cache. Where there are fewer images than half a register holds, each is cut into
*patches*, and patches take the place of images. A *tile* is ``PIECES`` positions of what is made.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional

from lightning_sparse.kernels.geometry import Geometry, Pair
from lightning_sparse.kernels.structure import CSR

__all__ = ["NONE", "PIECES", "Patches", "Plan", "backward", "forward", "usable"]

PIECES = 8  # registers for sums; as many hold addresses
NONE = np.iinfo(np.int32).min  # the offset of a place of the kernel that a phase does not meet
_CACHED = 1 << 20  # bytes that are packed at once


class _Axis(NamedTuple):
    """How rows are read to make other rows; the same of columns.

    Attributes:
        unit: rows that are made together, a phase each.
        ahead: rows that are read further on for each unit.
        first: row that is read first, of the first unit, at most 0: negative ones are zeros.
        starts: row from there that is read for each row that is made, ``(rows,)``; the rows are filled up to units.
        phases: of the rows that are made, from 0 to ``unit - 1``.
        taps: how far from there each place of the kernel reads, by phase, ``(unit, places)``; ``NONE``: it does not.
    """

    unit: int
    ahead: int
    first: int
    starts: Any
    phases: Any
    taps: Any

    @property
    def units(self) -> int:
        """Number of units of the rows that are made."""
        return len(self.starts) // self.unit

    def read(self, rows: int) -> int:
        """Return how many rows are read to make so many."""
        return int(self.starts[rows - 1] + self.taps.max() + 1)


def _axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    """Return how the input is read to make ``size`` rows of output."""
    rows, taps = np.arange(size), np.arange(kernel) * dilation
    return _Axis(1, stride, -padding, rows * stride, rows * 0, taps[None])


def _axis_back(size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    """Return how the output's gradient is read to make ``size`` rows of the input's."""
    rows = np.arange(math.ceil(size / stride) * stride) + padding
    first = min(0, (padding - (kernel - 1) * dilation) // stride)
    back = np.arange(kernel) * dilation - np.arange(stride)[:, None]
    taps = np.where(back % stride == 0, -(back // stride), NONE)
    return _Axis(stride, 1, first, rows // stride - first, rows % stride, taps)


class Patches(NamedTuple):
    """How images are cut, each into a grid of patches of one size.

    Attributes:
        grid: number of patches, down and across.
        made: rows and columns of a patch in what is made.
        first: row and column that the first patch reads first, at most 0.
        steps: how far on the next patch, down or across, begins to read.
        read: rows and columns that a patch reads.
    """

    grid: Pair
    made: Pair
    first: Pair
    steps: Pair
    read: Pair

    @property
    def positions(self) -> int:
        """Positions of what is made of an image, filled up to whole patches."""
        return math.prod(self.grid) * math.prod(self.made)

    def of_read(self, x: Tensor) -> Tensor:
        """Return what the patches read of images ``(batch, channels, height, width)``, as images; outside is 0."""
        return _windows(x, self.grid, self.first, self.steps, self.read)

    def of_made(self, y: Tensor) -> Tensor:
        """Return the patches of what images like ``y`` are made of, as images; outside is 0."""
        return _windows(y, self.grid, (0, 0), self.made, self.made)

    def empty(self, y: Tensor) -> Tensor:
        """Return images for the patches that ``y`` is to be made of."""
        return y.new_empty(len(y) * math.prod(self.grid), y.shape[1], *self.made)

    def joined(self, patches: Tensor, y: Tensor) -> Tensor:
        """Return the image that ``patches``, those of ``empty``, are of, in the shape of ``y``."""
        down, across = self.grid
        parts = patches.view(len(y), down, across, y.shape[1], *self.made).permute(0, 3, 1, 4, 2, 5)
        whole = parts.reshape(*y.shape[:2], down * self.made[0], across * self.made[1])
        return whole[:, :, : y.shape[2], : y.shape[3]]


def _windows(x: Tensor, grid: Pair, first: Pair, steps: Pair, sizes: Pair) -> Tensor:
    height, width = ((n - 1) * step + size for n, step, size in zip(grid, steps, sizes, strict=True))
    (top, left), (below, right) = first, (height + first[0] - x.shape[2], width + first[1] - x.shape[3])
    padded = functional.pad(x, (-left, max(right, 0), -top, max(below, 0)))[:, :, :height, :width]
    windows = padded.unfold(2, sizes[0], steps[0]).unfold(3, sizes[1], steps[1])
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], *sizes)


class Plan(NamedTuple):
    """How images of one array are read to write, or be multiplied with, those of another.

    A *chunk* is a band of rows of some groups of images, each of ``lanes``. Addresses count elements of what is packed.

    Attributes:
        lanes: images of a group.
        chunk: groups of images in a chunk; bands that an image has; rows of a band in the other array.
        packed: what is read for a band: how many rows, the first row of the first band, how many rows further on each
            band begins, columns of zeros on the left, positions of a row, elements of a position.
        position: elements of a position of the other array.
        xat: where what the tiles read begins, ``(tiles, PIECES)``.
        yat: the tiles' positions in the other array; the one behind the last is written but never read.
        phases: of the tiles, ``(tiles,)``.
        taps: how far from ``xat`` each place of the kernel reads, ``(phases, places)``; ``NONE``: it does not.
        patches: that take the place of images; None: there are enough images.
    """

    lanes: int
    chunk: tuple[int, int, int]
    packed: tuple[int, int, int, int, int, int]
    position: int
    xat: Any
    yat: Any
    phases: Any
    taps: Any
    patches: Patches | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of what is packed of the two arrays."""
        (groups, _, _), (rows, _, _, _, pitch, step) = self.chunk, self.packed
        return groups * rows * pitch * step, int(self.yat.max()) + self.position

    def chunks(self, images: int) -> int:
        """Return how many there are."""
        groups, bands, _ = self.chunk
        return math.ceil(images / (self.lanes * groups)) * bands


@lru_cache(maxsize=256)
def forward(
    how: Geometry, space: Pair, channels: int, filters: int, itemsize: int, lanes: int, patches: int = 1
) -> Plan:
    """Return how images of ``channels`` and this ``space`` are read to make those of ``filters``.

    Args:
        how: the images are read.
        space: height and width of the images.
        channels: of the images.
        filters: channels of what is made.
        itemsize: bytes of a number.
        lanes: images that a register holds.
        patches: into how many an image is cut at most.
    """
    return _plan(_axis, how, how.outputs(space), space, (channels, filters), itemsize, lanes, patches)


@lru_cache(maxsize=256)
def backward(
    how: Geometry, space: Pair, channels: int, filters: int, itemsize: int, lanes: int, patches: int = 1
) -> Plan:
    """Return how the output's gradient is read to make the input's; arguments as in ``forward``."""
    return _plan(_axis_back, how, space, how.outputs(space), (filters, channels), itemsize, lanes, patches)


def _plan(
    axis: Callable[..., _Axis],
    how: Geometry,
    made: Pair,
    read: Pair,
    channels: Pair,
    itemsize: int,
    lanes: int,
    most: int,
) -> Plan:
    """Return the plan to make images of size ``made`` of those of size ``read``; channels: read and made."""
    vertical, horizontal = (axis(*sizes) for sizes in zip(made, *how, strict=True))
    patches = None
    if most > 1:
        grid, made = _grid(vertical, horizontal, most)
        vertical, horizontal = (axis(*sizes) for sizes in zip(made, *how, strict=True))
        patches = _patches(grid, made, vertical, horizontal)
        vertical, horizontal, read = vertical._replace(first=0), horizontal._replace(first=0), patches.read
    width = made[1]
    step, position = ((n | 1) * lanes for n in channels)  # odd: powers of 2 would share few places of the cache
    left = -horizontal.first
    pitch = max(horizontal.read(width), left + read[1])
    rows, bands = _bands(vertical, itemsize * pitch * step, itemsize * width * position)
    groups = math.ceil(PIECES / (rows * width)) if bands == 1 else 1
    packed = vertical.read(rows), vertical.first, rows // vertical.unit * vertical.ahead, left, pitch, step
    group, i, j = np.unravel_index(np.arange(groups * rows * width), (groups, rows, width))
    xat = ((group * packed[0] + vertical.starts[i]) * pitch + horizontal.starts[j]) * step
    tiles = _tiles(xat, vertical.phases[i] * horizontal.unit + horizontal.phases[j], position)
    taps = _taps(vertical, horizontal, pitch, step)
    return Plan(lanes, (groups, bands, rows), packed, position, *tiles, taps, patches)


def _grid(vertical: _Axis, horizontal: _Axis, most: int) -> tuple[Pair, Pair]:
    """Return how many patches an image is cut into, down and across, and their size; rows first, which lie together."""
    tall = math.ceil(vertical.units / min(vertical.units, most))
    down = math.ceil(vertical.units / tall)
    wide = math.ceil(horizontal.units / min(horizontal.units, most // down))
    across = math.ceil(horizontal.units / wide)
    return (down, across), (tall * vertical.unit, wide * horizontal.unit)


def _patches(grid: Pair, made: Pair, vertical: _Axis, horizontal: _Axis) -> Patches:
    """Return patches that are read as these axes say."""
    down, across = (size // axis.unit * axis.ahead for size, axis in zip(made, (vertical, horizontal), strict=True))
    read = vertical.read(made[0]), horizontal.read(made[1])
    return Patches(grid, made, (vertical.first, horizontal.first), (down, across), read)


def _bands(axis: _Axis, read: int, made: int) -> tuple[int, int]:
    """Return rows of a band and how many bands there are; ``read`` and ``made`` are bytes of a packed row."""
    units = axis.units
    fitting = [n for n in range(1, units + 1) if axis.read(n * axis.unit) * read + n * axis.unit * made <= _CACHED]
    bands = math.ceil(units / max(fitting, default=1))
    return math.ceil(units / bands) * axis.unit, bands


def _tiles(xat: Any, phases: Any, position: int) -> tuple[Any, Any, Any]:
    """Return ``xat``, ``yat`` and ``phases`` of tiles: positions of one phase, the last one filled up."""
    tiles = []
    for phase in np.unique(phases):
        ours = np.flatnonzero(phases == phase)
        spare = np.full(-len(ours) % PIECES, len(xat))
        reads = np.append(xat[ours], np.full_like(spare, xat[ours[-1]])).reshape(-1, PIECES)
        tiles.append((reads, np.append(ours, spare).reshape(-1, PIECES) * position, np.full(len(reads), phase)))
    xats, yats, which = (np.concatenate(column) for column in zip(*tiles, strict=True))
    return xats, yats, which


def _taps(vertical: _Axis, horizontal: _Axis, pitch: int, step: int) -> Any:
    """Return the offset of each place of the kernel, by phase, ``(phases, places)``."""
    rows, columns = vertical.taps[:, None, :, None], horizontal.taps[None, :, None, :]
    offsets = (rows * pitch + columns) * step
    met = np.where((rows == NONE) | (columns == NONE), NONE, offsets)
    return met.reshape(vertical.unit * horizontal.unit, -1).astype(np.int32)


def usable(make: Callable[..., Plan], csr: CSR, x: Tensor, how: Geometry, itemsize: int, line: int) -> Plan | None:
    """Return the plan that ``make`` makes; None if unfolding is better, or refuses the input.

    That is where a few images fill less than half of a tile's lines, or more would be packed at once than one image
    takes unfolded.

    Args:
        make: ``forward`` or ``backward``.
        csr: the weight's nonzeros.
        x: the images, ``(batch, channels, height, width)``.
        how: they are read.
        itemsize: bytes of a number.
        line: bytes of a register.
    """
    batch, channels, *space = x.shape
    lanes = line // itemsize
    if not batch or csr.shape[1] != channels * math.prod(how.kernel_size):
        return None
    most = lanes // batch if 2 * batch < lanes else 1
    plan = make(how, tuple(space), channels, csr.shape[0], itemsize, lanes, most)
    if plan.patches is not None and 2 * batch * plan.patches.positions < PIECES * lanes:
        return None
    return plan if sum(plan.sizes) <= max(2 * _CACHED // itemsize, how.unfolded(x)) else None
