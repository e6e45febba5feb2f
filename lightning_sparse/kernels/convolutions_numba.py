"""Convolutions with a sparse weight as compiled loops (extra ``fast``): ``convolutions_torch`` on CPU, not unfolded.

A *line* is one number of as many images as a register holds, side by side. Some rows of some images, all channels of
them, are packed as ``[position][channel][image]``, with zeros around. A *tile* is ``_PIECES`` positions of the result:
their lines of one filter stay in registers while the filter's nonzeros are added, each a value, and an offset from
what the position reads first. The gradient of the nonzeros multiplies a tile's lines with those that they read. The
input gradient is the same computation as the result, with the transposed weight; with a stride its positions are of
several *phases*, by which places of the kernel they meet.

What is packed at once stays in the cache. Each element is added up in an order that depends on shapes alone, so chunks
of images and filters may be shared among threads without changing a bit.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from lightning_sparse.kernels import convolutions_torch as unfolding
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.numba_compiler import compiled, pool
from lightning_sparse.kernels.structure import CSR, Structure
from lightning_sparse.kernels.vectors_numba import add_row, transpose_block

if TYPE_CHECKING:
    from lightning_sparse.kernels import convolutions_numba as this
    from lightning_sparse.kernels.convolutions import Convolutions

    checked: Convolutions = this

__all__ = ["convolve", "gradients", "sampled"]

# the host's, not what torch says, which its environment can change: compiled code is kept by the host's features
_LINE = 64 if get_host_cpu_features().get("avx512f") else 32  # bytes
_PIECES = 8  # registers for sums; as many hold addresses
_CACHED = 1 << 20  # bytes that are packed at once
_CONVERTED = 1 << 21  # elements that are made contiguous or of another dtype at once
_SHARED_FROM = 1 << 18  # products
_PARTS = 8  # sums that the gradient of the nonzeros is made of: so many threads need not share filters
_NONE = np.iinfo(np.int32).min  # the offset of a place of the kernel that a phase does not meet


def convolve(csr: CSR, values: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """As ``convolutions_torch.convolve``."""
    plan = _usable(_forward, csr, x, how, values.dtype)
    if plan is None:
        return unfolding.convolve(csr, values, x, how, "numba")
    y = values.new_empty(len(x), csr.shape[0], *how.outputs(x.shape[2:]))
    lists = _array(csr.crow)[None], plan.offsets(csr), _array(values)
    for images in _copied(values.dtype, x):
        _multiply(plan, lists, _array(x[images].to(values.dtype)), y[images].numpy())
    return y


def gradients(
    weight: Structure, values: Tensor, x: Tensor, delta: Tensor, how: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As ``convolutions_torch.gradients``."""
    plan = _usable(_backward, weight.matrix, x, how, values.dtype)
    if plan is None:
        return unfolding.gradients(weight, values, x, delta, how, wanted, "numba")
    dx = _input_gradient(plan, weight, values, x, delta) if wanted[0] else None
    dvalues = sampled(weight.matrix, x, delta, how, values.dtype) if wanted[1] else None
    return dx, dvalues


def sampled(where: CSR, x: Tensor, delta: Tensor, how: Geometry, dtype: torch.dtype) -> Tensor:
    """As ``convolutions_torch.sampled``."""
    plan = _usable(_forward, where, x, how, dtype)
    if plan is None:
        return unfolding.sampled(where, x, delta, how, dtype, "numba")
    total, offsets = torch.zeros(len(where.col), dtype=dtype), plan.offsets(where)
    for images in _copied(dtype, x, delta):
        arrays = _array(x[images].to(dtype)), _array(delta[images].to(dtype))
        _sample(plan, _array(where.crow), offsets, total.numpy(), *arrays)
    return total


def _input_gradient(plan: "_Plan", weight: Structure, values: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    turned = weight.transposed.crow, weight.transposed.col, weight.permutation, values
    lists = _turned(*map(_array, turned), plan.lanes, plan.taps)  # type: ignore[call-arg]
    for images in _copied(values.dtype, delta, dx):
        part = dx[images].to(values.dtype)
        _multiply(plan, lists, _array(delta[images].to(values.dtype)), part.numpy())
        if part.dtype != dx.dtype:
            dx[images] = part.to(dx.dtype)
    return dx


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _copied(dtype: torch.dtype, *arrays: Tensor) -> Iterator[slice]:
    """Yield all images; some at a time, if they have to be copied to be contiguous and of this dtype."""
    ready = all(x.dtype == dtype and x.is_contiguous() for x in arrays)
    group, most = _LINE // dtype.itemsize, max(x[0].numel() for x in arrays)
    at_once = len(arrays[0]) if ready else max(1, _CONVERTED // (most * group)) * group
    for first in range(0, len(arrays[0]), at_once):
        yield slice(first, first + at_once)


# ---------------------------------------------------------------------- what is read for what


class _Axis(NamedTuple):
    """How rows are read to make other rows; the same of columns.

    Attributes:
        unit: rows that are made together, a phase each.
        ahead: rows that are read further on for each unit.
        first: row that is read first, of the first unit, at most 0: negative ones are zeros.
        starts: row from there that is read for each row that is made, ``(rows,)``; the rows are filled up to units.
        phases: of the rows that are made, from 0 to ``unit - 1``.
        taps: how far from there each place of the kernel reads, by phase, ``(unit, places)``; ``_NONE``: it does not.
    """

    unit: int
    ahead: int
    first: int
    starts: Any
    phases: Any
    taps: Any

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
    taps = np.where(back % stride == 0, -(back // stride), _NONE)
    return _Axis(stride, 1, first, rows // stride - first, rows % stride, taps)


class _Plan(NamedTuple):
    """How images of one array are read to write, or be multiplied with, those of another.

    A *chunk* is a band of rows of some groups of images, each of ``lanes``. Addresses count elements of what is packed.

    Attributes:
        lanes: images of a group.
        chunk: groups of images in a chunk; bands that an image has; rows of a band in the other array.
        packed: what is read for a band: how many rows, the first row of the first band, how many rows further on each
            band begins, columns of zeros on the left, positions of a row, elements of a position.
        position: elements of a position of the other array.
        xat: where what the tiles read begins, ``(tiles, _PIECES)``.
        yat: the tiles' positions in the other array; the one behind the last is written but never read.
        phases: of the tiles, ``(tiles,)``.
        taps: how far from ``xat`` each place of the kernel reads, ``(phases, places)``; ``_NONE``: it does not.
    """

    lanes: int
    chunk: tuple[int, int, int]
    packed: tuple[int, int, int, int, int, int]
    position: int
    xat: Any
    yat: Any
    phases: Any
    taps: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of what is packed of the two arrays."""
        (groups, _, _), (rows, _, _, _, pitch, step) = self.chunk, self.packed
        return groups * rows * pitch * step, int(self.yat.max()) + self.position

    def offsets(self, csr: CSR) -> Any:
        """Return how far from ``xat`` each nonzero reads, without phases."""
        return _offsets(_array(csr.col), self.lanes, self.taps[0])

    def chunks(self, images: int) -> int:
        """Return how many there are."""
        groups, bands, _ = self.chunk
        return math.ceil(images / (self.lanes * groups)) * bands


@lru_cache(maxsize=256)
def _forward(how: Geometry, space: tuple[int, int], channels: int, filters: int, itemsize: int) -> _Plan:
    """Return how images of ``channels`` and this ``space`` are read to make those of ``filters``."""
    outputs = how.outputs(space)
    vertical, horizontal = (_axis(*sizes) for sizes in zip(outputs, *how, strict=True))
    return _plan(vertical, horizontal, outputs[1], space[1], (channels, filters), itemsize)


@lru_cache(maxsize=256)
def _backward(how: Geometry, space: tuple[int, int], channels: int, filters: int, itemsize: int) -> _Plan:
    """Return how the output's gradient is read to make the input's; arguments as in ``_forward``."""
    vertical, horizontal = (_axis_back(*sizes) for sizes in zip(space, *how, strict=True))
    return _plan(vertical, horizontal, space[1], how.outputs(space)[1], (filters, channels), itemsize)


def _usable(make: Callable[..., _Plan], csr: CSR, x: Tensor, how: Geometry, dtype: torch.dtype) -> _Plan | None:
    """Return the plan that ``make`` makes; None if unfolding is better, or refuses the input.

    That is where images fill less than half of a line, or more would be packed at once than one image takes unfolded.
    """
    batch, channels, height, width = x.shape
    lanes = _LINE // dtype.itemsize
    if csr.shape[1] != channels * math.prod(how.kernel_size) or 2 * batch < lanes:
        return None
    plan = make(how, (height, width), channels, csr.shape[0], dtype.itemsize)
    return plan if sum(plan.sizes) <= max(2 * _CACHED // dtype.itemsize, how.unfolded(x)) else None


def _plan(vertical: _Axis, horizontal: _Axis, width: int, read: int, channels: tuple[int, int], itemsize: int) -> _Plan:
    """Return the plan to make rows of ``width`` columns of rows of ``read``; channels: read and made."""
    lanes = _LINE // itemsize
    step, position = ((n | 1) * lanes for n in channels)  # odd: powers of 2 would share few places of the cache
    left = -horizontal.first
    pitch = max(horizontal.read(width), left + read)
    rows, bands = _bands(vertical, itemsize * pitch * step, itemsize * width * position)
    groups = math.ceil(_PIECES / (rows * width)) if bands == 1 else 1
    packed = vertical.read(rows), vertical.first, rows // vertical.unit * vertical.ahead, left, pitch, step
    group, i, j = np.unravel_index(np.arange(groups * rows * width), (groups, rows, width))
    xat = ((group * packed[0] + vertical.starts[i]) * pitch + horizontal.starts[j]) * step
    tiles = _tiles(xat, vertical.phases[i] * horizontal.unit + horizontal.phases[j], position)
    return _Plan(lanes, (groups, bands, rows), packed, position, *tiles, _taps(vertical, horizontal, pitch, step))


def _bands(axis: _Axis, read: int, made: int) -> tuple[int, int]:
    """Return rows of a band and how many bands there are; ``read`` and ``made`` are bytes of a packed row."""
    units = len(axis.starts) // axis.unit
    fitting = [n for n in range(1, units + 1) if axis.read(n * axis.unit) * read + n * axis.unit * made <= _CACHED]
    bands = math.ceil(units / max(fitting, default=1))
    return math.ceil(units / bands) * axis.unit, bands


def _tiles(xat: Any, phases: Any, position: int) -> tuple[Any, Any, Any]:
    """Return ``xat``, ``yat`` and ``phases`` of tiles: positions of one phase, the last one filled up."""
    tiles = []
    for phase in np.unique(phases):
        ours = np.flatnonzero(phases == phase)
        spare = np.full(-len(ours) % _PIECES, len(xat))
        reads = np.append(xat[ours], np.full_like(spare, xat[ours[-1]])).reshape(-1, _PIECES)
        tiles.append((reads, np.append(ours, spare).reshape(-1, _PIECES) * position, np.full(len(reads), phase)))
    xats, yats, which = (np.concatenate(column) for column in zip(*tiles, strict=True))
    return xats, yats, which


def _taps(vertical: _Axis, horizontal: _Axis, pitch: int, step: int) -> Any:
    """Return the offset of each place of the kernel, by phase, ``(phases, places)``."""
    rows, columns = vertical.taps[:, None, :, None], horizontal.taps[None, :, None, :]
    offsets = (rows * pitch + columns) * step
    met = np.where((rows == _NONE) | (columns == _NONE), _NONE, offsets)
    return met.reshape(vertical.unit * horizontal.unit, -1).astype(np.int32)


# ---------------------------------------------------------------------- shared among threads


def _multiply(plan: _Plan, lists: tuple[Any, Any, Any], x: Any, y: Any) -> None:
    """Write into ``y`` what a sparse matrix, by phase, makes of ``x``."""

    def job(chunks: tuple[int, int], filters: tuple[int, int]) -> None:
        buffers = [np.zeros(size, x.dtype) for size in plan.sizes]
        where = plan.xat, plan.yat, plan.phases
        _multiply_chunks(*chunks, *filters, *plan[:4], *lists, x, y, *buffers, *where)  # type: ignore[call-arg]

    threads = _threads(len(lists[1]), y)
    chunks = _split(plan.chunks(len(x)), threads)
    for _ in _run(job, chunks, _rows(lists[0][0], threads // len(chunks)), threads):
        pass


def _sample(plan: _Plan, crow: Any, offsets: Any, total: Any, x: Any, g: Any) -> None:
    """Add to ``total`` the products of ``g`` with what the nonzeros read of ``x``."""

    def job(chunks: tuple[int, int], filters: tuple[int, int]) -> Any:
        buffers = [np.zeros(size, x.dtype) for size in plan.sizes]
        sums = np.zeros_like(total)
        where = plan.xat, plan.yat
        _sample_chunks(*chunks, *filters, *plan[:4], crow, offsets, sums, x, g, *buffers, *where)  # type: ignore[call-arg]
        return slice(crow[filters[0]], crow[filters[1]]), sums

    threads = _threads(len(offsets), g)
    chunks = _split(plan.chunks(len(x)), _PARTS)  # for any number of threads, as each part is added up by itself
    for ours, sums in _run(job, chunks, _rows(crow, threads // len(chunks)), threads):
        total[ours] += sums[ours]


def _threads(nnz: int, y: Any) -> int:
    """Return how many threads pay for so many nonzeros at each position of ``y``."""
    return torch.get_num_threads() if nnz * y.size // y.shape[1] >= _SHARED_FROM else 1


def _split(n: int, parts: int) -> list[tuple[int, int]]:
    """Return the beginnings and ends of at most so many parts of ``range(n)``."""
    return list(pairwise(np.linspace(0, n, min(n, parts) + 1).astype(int).tolist()))


def _rows(crow: Any, parts: int) -> list[tuple[int, int]]:
    """Return the beginnings and ends of at most so many parts of the rows, of about as many nonzeros."""
    ends = np.searchsorted(crow[:-1], np.linspace(0, crow[-1], max(parts, 1) + 1)[1:-1])
    return list(pairwise([0, *ends.tolist(), len(crow) - 1]))


def _run(job: Callable[..., Any], chunks: Any, filters: Any, threads: int) -> Iterator[Any]:
    """Yield what the jobs return, in one order."""
    jobs = list(product(chunks, filters))
    if threads == 1:
        return (job(*each) for each in jobs)
    futures = [pool(threads).submit(job, *each) for each in jobs]
    return (future.result() for future in futures)


# ---------------------------------------------------------------------- compiled


@compiled
def _multiply_chunks(  # type: ignore[no-untyped-def]
    first, last, low, high, lanes, chunk, packed, position, crow, offsets, values, x, y, X, Y, xat, yat, phases
):
    """Compute filters ``range(low, high)`` of the chunks ``range(first, last)``; ``X`` and ``Y`` are what is packed."""
    groups, bands, rows = chunk
    for c in range(first, last):
        image, band = c // bands * groups * lanes, c % bands
        _pack_read(x, image, band, lanes, groups, packed, X)
        for tile in range(len(xat)):
            xs, ys = _pieces(xat[tile]), _pieces(yat[tile])
            ends = crow[phases[tile]]
            for i in range(low, high):
                at = i * lanes
                add_row("matmul", _LINE, ends[i], ends[i + 1], offsets, 1, values, X, Y, xs, ys, at)  # type: ignore[call-arg]
        _unpack(y, image, band * rows, rows, low, high, lanes, groups, position, Y)


@compiled
def _sample_chunks(first, last, low, high, lanes, chunk, packed, position, crow, offsets, sums, x, g, X, G, xat, yat):  # type: ignore[no-untyped-def]
    """Add to ``sums`` what filters ``range(low, high)`` of the chunks ``range(first, last)`` give."""
    groups, bands, rows = chunk
    for c in range(first, last):
        image, band = c // bands * groups * lanes, c % bands
        _pack_read(x, image, band, lanes, groups, packed, X)
        for group in range(groups):
            base = group * rows * g.shape[3] * position
            _pack(g, image + group * lanes, band * rows, rows, low, high, lanes, base, 0, g.shape[3], position, G)
        for tile in range(len(xat)):
            xs, ys = _pieces(xat[tile]), _pieces(yat[tile])
            for i in range(low, high):
                at = i * lanes
                add_row("sampled", _LINE, crow[i], crow[i + 1], offsets, 1, G, X, sums, xs, ys, at)  # type: ignore[call-arg]


@compiled
def _pieces(starts):  # type: ignore[no-untyped-def]
    return to_fixed_tuple(starts, _PIECES)  # type: ignore[call-arg]


@compiled
def _pack_read(x, image, band, lanes, groups, packed, out):  # type: ignore[no-untyped-def]
    """Pack what a chunk reads."""
    rows, first, ahead, left, pitch, step = packed
    for group in range(groups):
        base = group * rows * pitch * step
        row = first + band * ahead
        _pack(x, image + group * lanes, row, rows, 0, x.shape[1], lanes, base, left, pitch, step, out)


@compiled
def _pack(x, image, row, rows, low, high, lanes, base, left, pitch, step, out):  # type: ignore[no-untyped-def]
    """Pack rows, and channels ``range(low, high)``, of ``lanes`` images; there are zeros outside of the images.

    Args:
        x: ``(batch, channels, height, width)``.
        image: the first.
        row: the first, also outside.
        rows: how many.
        low: channel.
        high: channel.
        lanes: images.
        base: where to write the first row.
        left: positions before the first column.
        pitch: positions of a row.
        step: elements of a position.
        out: what is packed.
    """
    batch, channels, height, width = x.shape
    source, apart = x.reshape(-1), channels * height * width
    begin, end = min(max(row, 0), height), max(min(row + rows, height), 0)
    for i in range(rows):
        if not begin <= row + i < end:
            at = base + (i * pitch + left) * step
            out[at : at + width * step] = 0
    count = max(end - begin, 0) * width
    whole = count // lanes * lanes if image + lanes <= batch else 0
    xs, outs = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for c in range(low, high):
        start = ((image * channels + c) * height + begin) * width
        line, i, j = base + ((begin - row) * pitch + left) * step + c * lanes, 0, 0
        for q in range(0, whole, lanes):
            for k in range(lanes):
                xs[k], outs[k] = start + q + k * apart, line + (i * pitch + j) * step
                i, j = (i, j + 1) if j + 1 < width else (i + 1, 0)
            transpose_block(_LINE, source, xs, out, outs)  # type: ignore[call-arg]
        for q in range(whole, count):
            at = line + (i * pitch + j) * step
            for k in range(lanes):
                out[at + k] = source[start + q + k * apart] if image + k < batch else 0
            i, j = (i, j + 1) if j + 1 < width else (i + 1, 0)


@compiled
def _unpack(y, image, row, rows, low, high, lanes, groups, position, packed):  # type: ignore[no-untyped-def]
    """Write what is packed of rows, and of channels ``range(low, high)``, into the images that there are."""
    batch, channels, height, width = y.shape
    target, apart = y.reshape(-1), channels * height * width
    count = min(rows, height - row) * width
    xs, outs = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for group in range(groups):
        first = image + group * lanes
        images = min(max(batch - first, 0), lanes)
        whole = count // lanes * lanes if images == lanes else 0
        for c in range(low, high):
            start = ((first * channels + c) * height + row) * width
            line = group * rows * width * position + c * lanes
            for q in range(0, whole, lanes):
                for k in range(lanes):
                    xs[k], outs[k] = line + (q + k) * position, start + q + k * apart
                transpose_block(_LINE, packed, xs, target, outs)  # type: ignore[call-arg]
            for q in range(whole, count):
                for k in range(images):
                    target[start + q + k * apart] = packed[line + q * position + k]


@compiled
def _offsets(col, lanes, taps):  # type: ignore[no-untyped-def]
    """Return how far from a position's beginning each nonzero reads: its channel and its place in the kernel."""
    offsets = np.empty(col.size, np.int32)
    for p in range(col.size):
        channel = col[p] // taps.size
        offsets[p] = channel * lanes + taps[col[p] - channel * taps.size]
    return offsets


@compiled
def _turned(crow, col, permutation, values, lanes, taps):  # type: ignore[no-untyped-def]
    """Return, of the transposed matrix, whose rows are places of channels, the lists that make input channels.

    By phase, one after the other: where each channel begins ``(phases, channels + 1)``, and offsets and values.
    """
    phases, places = taps.shape
    channels = (crow.size - 1) // places
    begins = np.empty((phases, channels + 1), np.int32)
    offsets, turned = np.empty(col.size, np.int32), np.empty(col.size, values.dtype)
    k = 0
    for phase in range(phases):
        for row in range(channels * places):
            place = row % places
            if place == 0:
                begins[phase, row // places] = k
            if taps[phase, place] != _NONE:
                for p in range(crow[row], crow[row + 1]):
                    offsets[k] = col[p] * lanes + taps[phase, place]
                    turned[k] = values[permutation[p]]
                    k += 1
        begins[phase, channels] = k
    return begins, offsets, turned
