"""Convolutions with a sparse weight as compiled loops (extra ``fast``): ``convolutions_torch`` on CPU, not unfolded.

A *line* is one number of as many images as a register holds, side by side; of a few images, of as many strips of rows.
Some rows of some images, all channels of them, are packed as ``[position][channel][image]``, with zeros around. A
*tile* is ``PIECES`` positions of the result: their lines of one filter stay in registers while the filter's nonzeros
are added, each a value, and an offset from what the position reads first. The gradient of the nonzeros multiplies a
tile's lines with those that they read. The input gradient is the same computation as the result, with the transposed
weight; with a stride its positions are of several *phases*, by which places of the kernel they meet.

What is packed at once stays in the cache. Each element is added up in an order that depends on shapes alone, so chunks
of images and filters may be shared among threads without changing a bit.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from lightning_sparse.kernels import convolutions_torch as unfolding
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.numba_compiler import compiled, pool
from lightning_sparse.kernels.plans import NONE, PIECES, Plan, backward, forward, usable
from lightning_sparse.kernels.structure import CSR, Structure
from lightning_sparse.kernels.vectors_numba import add_row, transpose_block

if TYPE_CHECKING:
    from lightning_sparse.kernels import convolutions_numba as this
    from lightning_sparse.kernels.convolutions import Convolutions

    checked: Convolutions = this

__all__ = ["convolve", "gradients", "sampled"]

# the host's, not what torch says, which its environment can change: compiled code is kept by the host's features
_LINE = 64 if get_host_cpu_features().get("avx512f") else 32  # bytes
_CONVERTED = 1 << 21  # elements that are made contiguous or of another dtype at once
_SHARED_FROM = 1 << 18  # products
_PARTS = 8  # sums that the gradient of the nonzeros is made of: so many threads need not share filters


def convolve(csr: CSR, values: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """As ``convolutions_torch.convolve``."""
    plan = usable(forward, csr, x, how, values.dtype.itemsize, _LINE)
    if plan is None:
        return unfolding.convolve(csr, values, x, how, "numba")
    y = values.new_empty(len(x), csr.shape[0], *how.outputs(x.shape[2:]))
    lists = _array(csr.crow)[None], _offsets(_array(csr.col), plan.lanes, plan.taps[0]), _array(values)
    for images in _copied(values.dtype, x):
        _write(plan, lists, x[images].to(values.dtype), y[images])
    return y


def gradients(
    weight: Structure, values: Tensor, x: Tensor, delta: Tensor, how: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As ``convolutions_torch.gradients``."""
    plan = usable(backward, weight.matrix, x, how, values.dtype.itemsize, _LINE)
    if plan is None:
        return unfolding.gradients(weight, values, x, delta, how, wanted, "numba")
    dx = _input_gradient(plan, weight, values, x, delta) if wanted[0] else None
    dvalues = sampled(weight.matrix, x, delta, how, values.dtype) if wanted[1] else None
    return dx, dvalues


def sampled(where: CSR, x: Tensor, delta: Tensor, how: Geometry, dtype: torch.dtype) -> Tensor:
    """As ``convolutions_torch.sampled``."""
    plan = usable(forward, where, x, how, dtype.itemsize, _LINE)
    if plan is None:
        return unfolding.sampled(where, x, delta, how, dtype, "numba")
    total, offsets = torch.zeros(len(where.col), dtype=dtype), _offsets(_array(where.col), plan.lanes, plan.taps[0])
    for images in _copied(dtype, x, delta):
        inputs = plan.strips.of_read(x[images].to(dtype), plan.lanes)
        G = plan.strips.of_made(delta[images].to(dtype), plan.lanes)
        _sample(plan, _array(where.crow), offsets, total.numpy(), _array(inputs), _array(G))
    return total


def _input_gradient(plan: Plan, weight: Structure, values: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    turned = weight.transposed.crow, weight.transposed.col, weight.permutation, values
    lists = _turned(*map(_array, turned), plan.lanes, plan.taps)  # type: ignore[call-arg]
    for images in _copied(values.dtype, delta, dx):
        part = dx[images].to(values.dtype)
        _write(plan, lists, delta[images].to(values.dtype), part)
        if part.dtype != dx.dtype:
            dx[images] = part.to(dx.dtype)
    return dx


def _write(plan: Plan, lists: tuple[Any, Any, Any], x: Tensor, y: Tensor) -> None:
    """Write into ``y`` what a sparse matrix, by phase, makes of ``x``."""
    made = plan.strips.empty(y, plan.lanes)
    _multiply(plan, lists, _array(plan.strips.of_read(x, plan.lanes)), made.numpy())
    if made is not y:
        y.copy_(made[: len(y), :, : y.shape[2]])


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _copied(dtype: torch.dtype, *arrays: Tensor) -> Iterator[slice]:
    """Yield all images; some at a time, if they have to be copied to be contiguous and of this dtype."""
    ready = all(x.dtype == dtype and x.is_contiguous() for x in arrays)
    group, most = _LINE // dtype.itemsize, max(x[0].numel() for x in arrays)
    at_once = len(arrays[0]) if ready else max(1, _CONVERTED // (most * group)) * group
    for first in range(0, len(arrays[0]), at_once):
        yield slice(first, first + at_once)


# ---------------------------------------------------------------------- shared among threads


def _multiply(plan: Plan, lists: tuple[Any, Any, Any], x: Any, y: Any) -> None:
    """Write into ``y`` what a sparse matrix, by phase, makes of ``x``."""

    def job(chunks: tuple[int, int], filters: tuple[int, int]) -> None:
        buffers = [np.zeros(size, x.dtype) for size in plan.sizes]
        where = plan.xat, plan.yat, plan.phases
        _multiply_chunks(*chunks, *filters, *plan[:5], *lists, x, y, *buffers, *where)  # type: ignore[call-arg]

    threads = _threads(len(lists[1]), y)
    chunks = _split(plan.chunks(len(x)), threads)
    for _ in _run(job, chunks, _rows(lists[0][0], threads // len(chunks)), threads):
        pass


def _sample(plan: Plan, crow: Any, offsets: Any, total: Any, x: Any, g: Any) -> None:
    """Add to ``total`` the products of ``g`` with what the nonzeros read of ``x``."""

    def job(chunks: tuple[int, int], filters: tuple[int, int]) -> Any:
        buffers = [np.zeros(size, x.dtype) for size in plan.sizes]
        sums = np.zeros_like(total)
        where = plan.xat, plan.yat
        _sample_chunks(*chunks, *filters, *plan[:5], crow, offsets, sums, x, g, *buffers, *where)  # type: ignore[call-arg]
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
    first, last, low, high, lanes, chunk, packed, position, strips, crow, offsets, values, x, y, X, Y, xat, yat, phases
):
    """Compute filters ``range(low, high)`` of the chunks ``range(first, last)``; ``X`` and ``Y`` are what is packed."""
    groups, bands, rows = chunk
    for c in range(first, last):
        image, band = c // bands * groups * lanes, c % bands
        _pack_read(x, image, band, lanes, groups, packed, strips, X)
        for tile in range(len(xat)):
            xs, ys = _pieces(xat[tile]), _pieces(yat[tile])
            ends = crow[phases[tile]]
            for i in range(low, high):
                at = i * lanes
                add_row("matmul", _LINE, ends[i], ends[i + 1], offsets, 1, values, X, Y, xs, ys, at)  # type: ignore[call-arg]
        _unpack(y, image, band * rows, rows, low, high, lanes, groups, position, strips, Y)


@compiled
def _sample_chunks(  # type: ignore[no-untyped-def]
    first, last, low, high, lanes, chunk, packed, position, strips, crow, offsets, sums, x, g, X, G, xat, yat
):
    """Add to ``sums`` what filters ``range(low, high)`` of the chunks ``range(first, last)`` give."""
    (groups, bands, rows), (number, _, _, _, made) = chunk, strips
    for c in range(first, last):
        image, band = c // bands * groups * lanes, c % bands
        _pack_read(x, image, band, lanes, groups, packed, strips, X)
        for group in range(groups):
            base, width, cut = group * rows * g.shape[3] * position, g.shape[3], (number, made, made)
            _pack(g, image + group * lanes, band * rows, rows, low, high, lanes, base, 0, width, position, cut, G)
        for tile in range(len(xat)):
            xs, ys = _pieces(xat[tile]), _pieces(yat[tile])
            for i in range(low, high):
                at = i * lanes
                add_row("sampled", _LINE, crow[i], crow[i + 1], offsets, 1, G, X, sums, xs, ys, at)  # type: ignore[call-arg]


@compiled
def _pieces(starts):  # type: ignore[no-untyped-def]
    return to_fixed_tuple(starts, PIECES)  # type: ignore[call-arg]


@compiled
def _pack_read(x, image, band, lanes, groups, packed, strips, out):  # type: ignore[no-untyped-def]
    """Pack what a chunk reads."""
    (rows, first, ahead, left, pitch, step), (number, _, further, read, _) = packed, strips
    for group in range(groups):
        base = group * rows * pitch * step
        row = first + band * ahead
        cut = number, further, read
        _pack(x, image + group * lanes, row, rows, 0, x.shape[1], lanes, base, left, pitch, step, cut, out)


@compiled
def _pack(x, image, row, rows, low, high, lanes, base, left, pitch, step, cut, out):  # type: ignore[no-untyped-def]
    """Pack rows, and channels ``range(low, high)``, of ``lanes`` strips; there are zeros outside of the strips.

    Args:
        x: ``(batch, channels, height, width)``.
        image: the first strip.
        row: the first, also outside.
        rows: how many.
        low: channel.
        high: channel.
        lanes: strips.
        base: where to write the first row.
        left: positions before the first column.
        pitch: positions of a row.
        step: elements of a position.
        cut: strips of an image, how many rows further on each begins, and how many it has.
        out: what is packed.
    """
    batch, _, height, width = x.shape
    number, further, tall = cut
    source, starts = x.reshape(-1), _starts(image, lanes, number, further, x.shape)
    begin, end = min(max(row, 0), tall), max(min(row + rows, tall), 0)
    for i in range(rows):
        if not begin <= row + i < end:
            at = base + (i * pitch + left) * step
            out[at : at + width * step] = 0
    count = max(end - begin, 0) * width
    whole = count // lanes * lanes if image + lanes <= batch * number else 0
    xs, outs = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for c in range(low, high):
        start = (c * height + begin) * width
        line, i, j = base + ((begin - row) * pitch + left) * step + c * lanes, 0, 0
        for q in range(0, whole, lanes):
            for k in range(lanes):
                xs[k], outs[k] = starts[k] + start + q, line + (i * pitch + j) * step
                i, j = (i, j + 1) if j + 1 < width else (i + 1, 0)
            transpose_block(_LINE, source, xs, out, outs)  # type: ignore[call-arg]
        for q in range(whole, count):
            at = line + (i * pitch + j) * step
            for k in range(lanes):
                out[at + k] = source[starts[k] + start + q] if image + k < batch * number else 0
            i, j = (i, j + 1) if j + 1 < width else (i + 1, 0)


@compiled
def _unpack(y, image, row, rows, low, high, lanes, groups, position, strips, packed):  # type: ignore[no-untyped-def]
    """Write what is packed of rows, and of channels ``range(low, high)``, into the strips that there are."""
    (batch, _, height, width), (number, _, _, _, made) = y.shape, strips
    target, count = y.reshape(-1), min(rows, made - row) * width
    xs, outs = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for group in range(groups):
        first = image + group * lanes
        images = min(max(batch * number - first, 0), lanes)
        starts = _starts(first, lanes, number, made, y.shape)
        whole = count // lanes * lanes if images == lanes else 0
        for c in range(low, high):
            start = (c * height + row) * width
            line = group * rows * width * position + c * lanes
            for q in range(0, whole, lanes):
                for k in range(lanes):
                    xs[k], outs[k] = line + (q + k) * position, starts[k] + start + q
                transpose_block(_LINE, packed, xs, target, outs)  # type: ignore[call-arg]
            for q in range(whole, count):
                for k in range(images):
                    target[starts[k] + start + q] = packed[line + q * position + k]


@compiled
def _starts(first, lanes, number, further, shape):  # type: ignore[no-untyped-def]
    """Return where the strips ``range(first, first + lanes)`` begin in images of this shape."""
    _, channels, height, width = shape
    starts = np.empty(lanes, np.int64)
    for k in range(lanes):
        image = (first + k) // number
        starts[k] = (image * channels * height + (first + k - image * number) * further) * width
    return starts


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
            if taps[phase, place] != NONE:
                for p in range(crow[row], crow[row + 1]):
                    offsets[k] = col[p] * lanes + taps[phase, place]
                    turned[k] = values[permutation[p]]
                    k += 1
        begins[phase, channels] = k
    return begins, offsets, turned
