"""Thresholding of all weights of an optimizer at once: one launch a function (Triton, which torch for CUDA brings).

The weights lie end to end in one vector. A *row* is a stretch of it, what one output reads; ``Rows`` says where each
begins. A program takes a few rows, block by block, so each row is summed in the same order at every step. On a CPU
Triton's interpreter computes, which is slow: ``LIGHTNING_SPARSE_KERNELS=fused`` is there for tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sparse.kernels.thresholds_torch import TINY, add_rows, near, occupied
from lightning_sparse.kernels.triton_compiler import INTERPRETED, kernel, launch

__all__ = [
    "INTERPRETED",
    "Rows",
    "add_rows",
    "exponential_penalty",
    "known_finite",
    "launch",
    "near",
    "occupied",
    "through_abs",
    "through_sigmoid",
    "variance_penalty",
]

_sum, _max = kernel(tl.sum), kernel(tl.max)
_VECTOR = 1024  # elements of a vector that a program takes


# ---------------------------------------------------------------------- rows


@kernel
def _surrogate(x):  # type: ignore[no-untyped-def]
    """Return ``H(x)`` for ``x >= 0``, the long-tailed derivative of the step (DST, Eq. 3)."""
    tail = x * 0 + 0.4  # a constant by itself would be one of float32
    return tl.where(x <= 1, tl.maximum(2 - 4 * x, tail), 0)


@kernel
def _hard_project(W, tau, out, counts, starts, widths, of, layers, R, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    start, width = tl.load(starts + row, live, 0)[:, None], tl.load(widths + row, live, 0)
    t = tl.load(tau + tl.load(of + row, live, 0), live, 0)[:, None]
    passing = tl.full((ROWS,), 0, tl.int32)
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = column < width[:, None]
        w = tl.load(W + start + column, inside, 0)
        keep = (tl.abs(w).to(t.dtype) <= t) == 0  # NaN stays NaN, for the user to see
        tl.store(out + start + column, tl.where(keep, w, 0), inside)
        passing += _sum((keep & inside).to(tl.int32), 1)
    tl.atomic_add(counts + tl.load(layers + row, live, 0), passing, live)


@kernel
def _hard_gradient(dP, W, tau, dtau, starts, widths, of, R, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    start, width = tl.load(starts + row, live, 0)[:, None], tl.load(widths + row, live, 0)
    t = tl.load(tau + tl.load(of + row, live, 0), live, 0)[:, None]
    total = tl.full((ROWS,), 0, t.dtype)
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = column < width[:, None]
        w = tl.load(W + start + column, inside, 0).to(t.dtype)
        g = tl.load(dP + start + column, inside, 0).to(t.dtype)
        q = tl.abs(w) - t
        h = _surrogate(tl.abs(q))
        total += _sum(g * w * h, 1)
        g = g * (tl.where(q > 0, 1, 0) + tl.abs(w) * h)
        tl.store(dP + start + column, g.to(dP.dtype.element_ty), inside)
    tl.store(dtau + row, -total, live)


@kernel
def _soft_project(W, tau, out, starts, widths, of, R, shrinkage, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    start, width = tl.load(starts + row, live, 0)[:, None], tl.load(widths + row, live, 0)
    t = tl.load(tau + tl.load(of + row, live, 0), live, 0)[:, None]
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = column < width[:, None]
        w = tl.load(W + start + column, inside, 0).to(t.dtype)
        w = tl.where(tl.abs(w) <= t, 0, w - shrinkage * tl.minimum(tl.maximum(w, -t), t))  # NaN stays NaN
        tl.store(out + start + column, w.to(out.dtype.element_ty), inside)


@kernel
def _soft_gradient(dP, W, tau, dtau, starts, widths, of, R, alpha, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    start, width = tl.load(starts + row, live, 0)[:, None], tl.load(widths + row, live, 0)
    t = tl.load(tau + tl.load(of + row, live, 0), live, 0)[:, None]
    total = tl.full((ROWS,), 0, t.dtype)
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = column < width[:, None]
        w = tl.load(W + start + column, inside, 0).to(t.dtype)
        g = tl.load(dP + start + column, inside, 0).to(t.dtype)
        g = tl.where(tl.abs(w) > t, g, g * alpha)
        total += _sum(tl.where(w > 0, g, tl.where(w < 0, -g, 0)), 1)
        tl.store(dP + start + column, g.to(dP.dtype.element_ty), inside)
    tl.store(dtau + row, -total, live)


@kernel
def _backward_mask(  # type: ignore[no-untyped-def]
    G, tau, bits, weighted, plain, moments, starts, widths, of, places, R, tiny,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    start, width = tl.load(starts + row, live, 0)[:, None], tl.load(widths + row, live, 0)
    t = tl.load(tau + tl.load(of + row, live, 0), live, 0)[:, None]
    place = tl.load(places + row, live, 0)[:, None]
    size = tl.full((ROWS,), 0, t.dtype)
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        size += _sum(tl.abs(tl.load(G + start + column, column < width[:, None], 0).to(t.dtype)), 1)
    scale = tl.where(size < tiny, 0, 1 / tl.where(size < tiny, 1, size))[:, None]
    a, b, c, d = size * 0, size * 0, (size * 0).to(tl.float64), (size * 0).to(tl.float64)
    for first in range(0, _max(width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = column < width[:, None]
        g = tl.load(G + start + column, inside, 0).to(t.dtype)
        q = tl.abs(g) * scale - t
        h = _surrogate(tl.abs(q))
        keep = q >= 0
        kept = g * tl.where(keep, 1, 0)  # NaN stays NaN
        a += _sum(tl.where(inside, kept * g * h, 0), 1)
        b += _sum(tl.where(inside, g * h, 0), 1)
        c += _sum(kept.to(tl.float64), 1)
        d += _sum(kept.to(tl.float64) * kept.to(tl.float64), 1)
        tl.store(G + start + column, kept.to(G.dtype.element_ty), inside)
        flags = (keep & inside).to(tl.int32) << (column % 8)
        packed = _sum(tl.reshape(flags, (ROWS, BLOCK // 8, 8)), 2)
        byte = first // 8 + tl.arange(0, BLOCK // 8)[None, :]
        tl.store(bits + place + byte, packed.to(tl.uint8), byte * 8 < width[:, None])
    tl.store(weighted + row, a, live)
    tl.store(plain + row, b, live)
    tl.store(moments + 2 * row, c, live)
    tl.store(moments + 2 * row + 1, d, live)


def _tile(rows: int, longest: int) -> tuple[int, int]:
    """Return how many rows a program takes, and how many elements of each at once; the interpreter wants large ones."""
    most = (1024, 4096) if INTERPRETED else (4, 512)
    return min(most[0], triton.next_power_of_2(rows)), min(most[1], max(8, triton.next_power_of_2(longest)))


@dataclass(frozen=True)
class Rows:
    """The rows of several weights that lie end to end, and what methods with thresholds compute with them.

    Its functions are those of ``thresholds_torch`` on vectors: of all weights ``W``, ``dP``, ``out`` and ``G``, of one
    number a threshold ``tau``, of one number a row the sums. ``bits`` is the masks of all rows, packed one by one.

    Attributes:
        starts: where each row begins, ``(R,)``.
        widths: how long it is.
        of: which threshold is its own.
        layers: which weight it is of.
        places: where its bits begin.
        counts: room for a number a weight.
        moments: room for two numbers a row.
        tile: how many rows, and elements of each, a program takes at once.
    """

    starts: Tensor
    widths: Tensor
    of: Tensor
    layers: Tensor
    places: Tensor
    counts: Tensor
    moments: Tensor
    tile: tuple[int, int]

    @classmethod
    def of_shapes(cls, shapes: Sequence[tuple[int, int]], per_row: bool, device: torch.device) -> "Rows":
        """Lay matrices of these shapes ``(out, n)`` out; ``per_row``: each row has a threshold, else each matrix."""
        rows = torch.tensor([out for out, _ in shapes])
        widths = torch.tensor([n for _, n in shapes]).repeat_interleave(rows)
        layers = torch.arange(len(shapes)).repeat_interleave(rows)
        of = torch.arange(len(widths)) if per_row else layers
        return cls(
            starts=(widths.cumsum(0) - widths).to(device),
            widths=widths.to(device, torch.int32),
            of=of.to(device, torch.int32),
            layers=layers.to(device, torch.int32),
            places=(((widths + 7) // 8).cumsum(0) - (widths + 7) // 8).to(device),
            counts=torch.zeros(len(shapes), dtype=torch.int32, device=device),
            moments=torch.zeros(len(widths), 2, dtype=torch.float64, device=device),
            tile=_tile(len(widths), max(n for _, n in shapes)),
        )

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        rows, block = self.tile
        launch(kernel, triton.cdiv(len(self.starts), rows), *arguments, ROWS=rows, BLOCK=block)

    def hard_project(self, W: Tensor, tau: Tensor, out: Tensor) -> Tensor:
        """Write ``W * 1[|W| > tau]``; return how many of each weight pass, in memory that the next call writes."""
        self.counts.zero_()
        self._launch(
            _hard_project, W, tau, out, self.counts, self.starts, self.widths, self.of, self.layers, len(self.starts)
        )
        return self.counts

    def hard_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
        """As ``thresholds_torch.hard_gradient``."""
        self._launch(_hard_gradient, dP, W, tau, dtau, self.starts, self.widths, self.of, len(self.starts))

    def soft_project(self, W: Tensor, tau: Tensor, out: Tensor, shrinkage: float = 1.0) -> None:
        """As ``thresholds_torch.soft_project``."""
        self._launch(_soft_project, W, tau, out, self.starts, self.widths, self.of, len(self.starts), float(shrinkage))

    def soft_gradient(self, dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
        """As ``thresholds_torch.soft_gradient``."""
        self._launch(
            _soft_gradient, dP, W, tau, dtau, self.starts, self.widths, self.of, len(self.starts), float(alpha)
        )

    def backward_mask(
        self, G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor
    ) -> None:
        """As ``thresholds_torch.backward_mask``."""
        self._launch(
            _backward_mask, G, tau, bits, weighted, plain, self.moments,
            self.starts, self.widths, self.of, self.places, len(self.starts), TINY,
        )  # fmt: skip
        moments.add_(self.moments.sum(0))


# ---------------------------------------------------------------------- vectors


@kernel
def _through_abs(dt, t, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(dt + place, place < n, 0)
    tl.store(dt + place, tl.where(tl.load(t + place, place < n, 0) < 0, -g, g), place < n)


@kernel
def _through_sigmoid(dt, t, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    T = 1 / (1 + tl.exp(-tl.load(t + place, place < n, 0)))
    tl.store(dt + place, tl.load(dt + place, place < n, 0) * (T * (1 - T)), place < n)


@kernel
def _exponential_penalty(dt, t, n, alpha, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, x = tl.load(dt + place, place < n, 0), tl.load(t + place, place < n, 0)
    tl.store(dt + place, g - alpha * tl.exp(-x), place < n)


@kernel
def _variance_penalty(weighted, plain, moments, n, N, beta, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = tl.load(moments), tl.load(moments + 1)
    m = first / N
    square = (second - m * first) * (N - 1)
    factor = tl.where((square > 0) & (square < float("inf")), -beta / tl.sqrt(square), 0.0)
    a, b = tl.load(weighted + place, place < n, 0), tl.load(plain + place, place < n, 0)
    tl.store(weighted + place, (a - m.to(a.dtype) * b) * factor.to(a.dtype), place < n)


def _over(kernel: Any, x: Tensor, *arguments: Any) -> None:
    launch(kernel, triton.cdiv(len(x), _VECTOR), x, *arguments, BLOCK=_VECTOR)


def through_abs(dt: Tensor, t: Tensor) -> None:
    """As ``thresholds_torch.through_abs``."""
    _over(_through_abs, dt, t, len(t))


def through_sigmoid(dt: Tensor, t: Tensor) -> None:
    """As ``thresholds_torch.through_sigmoid``."""
    _over(_through_sigmoid, dt, t, len(t))


def exponential_penalty(dt: Tensor, t: Tensor, alpha: float) -> None:
    """As ``thresholds_torch.exponential_penalty``."""
    _over(_exponential_penalty, dt, t, len(t), float(alpha))


def variance_penalty(weighted: Tensor, plain: Tensor, moments: Tensor, N: int, beta: float) -> None:
    """As ``thresholds_torch.variance_penalty``."""
    _over(_variance_penalty, weighted, plain, moments, len(plain), N, float(beta))


def known_finite(x: Tensor) -> bool:
    """Return False: there is no waiting for a GPU to find out."""
    return False
