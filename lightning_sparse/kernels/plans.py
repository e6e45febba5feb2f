"""What compiled convolutions read to make what: the places of the numbers that are packed for them.

A *line* is one number of as many images as a register holds, side by side. Images are read and made in *bands* of rows,
as many at once as stay in the cache. Where there are fewer images than half a register holds, each is cut into *strips*
of rows, and strips take the place of images. A *tile* is ``PIECES`` positions of what is made.
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

__all__ = ["NONE", "PIECES", "Plan", "Strips", "backward", "forward", "usable"]

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


class Strips(NamedTuple):
    """How images are cut into strips of rows, each image into as many.

    Whole images are one strip each.

    Attributes:
        number: strips of an image.
        first: row that the first strip reads first, at most 0.
        ahead: rows further on the next strip begins to read.
        read: rows that a strip reads.
        made: rows of a strip in what is made.
    """

    number: int
    first: int
    ahead: int
    read: int
    made: int

    def of_read(self, x: Tensor, lanes: int) -> Tensor:
        """Return images ``(batch, channels, height, width)`` with all rows that strips read; outside is 0."""
        return self._filled(x, lanes, -self.first, (self.number - 1) * self.ahead + self.read)

    def of_made(self, y: Tensor, lanes: int) -> Tensor:
        """Return images with all rows that strips make; outside is 0."""
        return self._filled(y, lanes, 0, self.number * self.made)

    def empty(self, y: Tensor, lanes: int) -> Tensor:
        """Return images for all rows that strips make: ``y`` itself, if it has no others."""
        shape = lanes // self.number, y.shape[1], self.number * self.made, y.shape[3]
        return y if self.number == 1 or y.shape == shape else y.new_empty(shape)

    def _filled(self, x: Tensor, lanes: int, above: int, height: int) -> Tensor:
        """Return images with so many rows; a few are filled up to as many as have strips for all ``lanes``."""
        below, images = height - above - x.shape[2], lanes // self.number - len(x)
        if self.number == 1 or not (above or below or images):
            return x
        return functional.pad(x, (0, 0, above, max(below, 0), 0, 0, 0, images))[:, :, :height]


class Plan(NamedTuple):
    """How images of one array are read to write, or be multiplied with, those of another.

    A *chunk* is a band of rows of some groups of images, each of ``lanes``. Addresses count elements of what is packed.

    Attributes:
        lanes: images of a group.
        chunk: groups of images in a chunk; bands that an image has; rows of a band in the other array.
        packed: what is read for a band: how many rows, the first row of the first band, how many rows further on each
            band begins, columns of zeros on the left, positions of a row, elements of a position.
        position: elements of a position of the other array.
        strips: that take the place of images.
        xat: where what the tiles read begins, ``(tiles, PIECES)``.
        yat: the tiles' positions in the other array; the one behind the last is written but never read.
        phases: of the tiles, ``(tiles,)``.
        taps: how far from ``xat`` each place of the kernel reads, ``(phases, places)``; ``NONE``: it does not.
    """

    lanes: int
    chunk: tuple[int, int, int]
    packed: tuple[int, int, int, int, int, int]
    position: int
    strips: Strips
    xat: Any
    yat: Any
    phases: Any
    taps: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of what is packed of the two arrays."""
        (groups, _, _), (rows, _, _, _, pitch, step) = self.chunk, self.packed
        return groups * rows * pitch * step, int(self.yat.max()) + self.position

    def chunks(self, images: int) -> int:
        """Return how many there are."""
        groups, bands, _ = self.chunk
        return math.ceil(images * self.strips.number / (self.lanes * groups)) * bands


@lru_cache(maxsize=256)
def forward(
    how: Geometry, space: Pair, channels: int, filters: int, itemsize: int, lanes: int, strips: int = 1
) -> Plan:
    """Return how images of ``channels`` and this ``space`` are read to make those of ``filters``.

    Args:
        how: the images are read.
        space: height and width of the images.
        channels: of the images.
        filters: channels of what is made.
        itemsize: bytes of a number.
        lanes: images that a register holds.
        strips: into how many an image is cut.
    """
    return _plan(_axis, how, how.outputs(space), space, (channels, filters), itemsize, lanes, strips)


@lru_cache(maxsize=256)
def backward(
    how: Geometry, space: Pair, channels: int, filters: int, itemsize: int, lanes: int, strips: int = 1
) -> Plan:
    """Return how the output's gradient is read to make the input's; arguments as in ``forward``."""
    return _plan(_axis_back, how, space, how.outputs(space), (filters, channels), itemsize, lanes, strips)


def _plan(
    axis: Callable[..., _Axis],
    how: Geometry,
    made: Pair,
    read: Pair,
    channels: Pair,
    itemsize: int,
    lanes: int,
    number: int,
) -> Plan:
    """Return the plan to make images of size ``made`` of those of size ``read``; channels: read and made."""
    vertical, horizontal = (axis(*sizes) for sizes in zip(made, *how, strict=True))
    strips, width = Strips(1, 0, 0, read[0], made[0]), made[1]
    if number > 1:
        vertical, strips = _cut(vertical, number)
    step, position = ((n | 1) * lanes for n in channels)  # odd: powers of 2 would share few places of the cache
    left = -horizontal.first
    pitch = max(horizontal.read(width), left + read[1])
    rows, bands = _bands(vertical, itemsize * pitch * step, itemsize * width * position)
    groups = math.ceil(PIECES / (rows * width)) if bands == 1 else 1
    packed = vertical.read(rows), vertical.first, rows // vertical.unit * vertical.ahead, left, pitch, step
    group, i, j = np.unravel_index(np.arange(groups * rows * width), (groups, rows, width))
    xat = ((group * packed[0] + vertical.starts[i]) * pitch + horizontal.starts[j]) * step
    tiles = _tiles(xat, vertical.phases[i] * horizontal.unit + horizontal.phases[j], position)
    return Plan(
        lanes, (groups, bands, rows), packed, position, strips, *tiles, _taps(vertical, horizontal, pitch, step)
    )


def _cut(axis: _Axis, number: int) -> tuple[_Axis, Strips]:
    """Return how the rows of a strip are read, from its own first one on, and how images are cut into such strips."""
    units = math.ceil(axis.units / number)
    made = units * axis.unit
    cut = axis._replace(first=0, starts=axis.starts[:made], phases=axis.phases[:made])
    return cut, Strips(number, axis.first, units * axis.ahead, cut.read(made), made)


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

    That is where the strips of a few images fill less than half of a tile, or of a register, or more would be packed at
    once than one image takes unfolded.

    Args:
        make: ``forward`` or ``backward``.
        csr: the weight's nonzeros.
        x: the images, ``(batch, channels, height, width)``.
        how: they are read.
        itemsize: bytes of a number.
        line: bytes of a register.
    """
    batch, channels, height, width = x.shape
    lanes = line // itemsize
    if not batch or csr.shape[1] != channels * math.prod(how.kernel_size):
        return None
    number = 1 << (lanes // batch).bit_length() - 1 if 2 * batch < lanes else 1
    plan = make(how, (height, width), channels, csr.shape[0], itemsize, lanes, number)
    if number > 1 and (plan.chunk[0] > 2 or 2 * how.outputs((height, width))[0] < number):
        return None
    return plan if sum(plan.sizes) <= max(2 * _CACHED // itemsize, how.unfolded(x)) else None
