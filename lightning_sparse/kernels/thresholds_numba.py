"""Thresholding as one compiled loop each (extra ``fast``), on CPU and with ``tau (out, 1)``; see ``thresholds_torch``.

A row's result depends on that row alone, so rows may be shared among threads without changing a bit.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.bits import GATHER
from lightning_sparse.kernels.numba_compiler import compiled, pool
from lightning_sparse.kernels.thresholds_torch import TINY

if TYPE_CHECKING:
    from lightning_sparse.kernels import thresholds_numba as this
    from lightning_sparse.kernels.thresholds import ThresholdKernels

    checked: ThresholdKernels = this

__all__ = [
    "add_rows",
    "backward_mask",
    "exponential_penalty",
    "hard_gradient",
    "hard_project",
    "known_finite",
    "near",
    "occupied",
    "soft_gradient",
    "soft_project",
    "through_abs",
    "through_sigmoid",
    "variance_penalty",
]

_SHARED_FROM = 1 << 18
_NEAR = 64  # in one look


def _over_rows(kernel: Callable[..., Any], tensors: tuple[Tensor, ...], *scalars: Any) -> list[Any]:
    """Run ``kernel(*rows of tensors, *scalars)``, on torch's number of threads where the matrix is large."""
    arrays = [tensor.numpy() for tensor in tensors]
    if arrays[0].size < _SHARED_FROM:
        return [kernel(*arrays, *scalars)]
    out = len(arrays[0])
    threads = min(torch.get_num_threads(), out)
    if threads == 1:
        return [kernel(*arrays, *scalars)]
    edges = [out * i // threads for i in range(threads + 1)]
    jobs = [pool(threads).submit(kernel, *(array[a:b] for array in arrays), *scalars) for a, b in pairwise(edges)]
    return [job.result() for job in jobs]


@compiled
def _hard_project(W, tau, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(W.shape[0]):
        t = tau[i, 0]
        for j in range(W.shape[1]):
            keep = not abs(W[i, j]) <= t  # NaN stays NaN, for the user to see
            out[i, j] = W[i, j] if keep else W.dtype.type(0)
            count += keep
    return count


def hard_project(W: Tensor, tau: Tensor, out: Tensor) -> int:
    """As ``thresholds_torch.hard_project``."""
    return sum(_over_rows(_hard_project, (W, tau, out)))


@compiled
def _hard_gradient(dP, W, tau, dtau):  # type: ignore[no-untyped-def]
    real = W.dtype.type
    one, zero, two, four, tail = real(1), real(0), real(2), real(4), real(0.4)
    for i in range(W.shape[0]):
        t = tau[i, 0]
        total = zero
        for j in range(W.shape[1]):
            w, g = W[i, j], dP[i, j]
            magnitude = abs(w)
            q = magnitude - t
            r = abs(q)
            h = max(two - four * r, tail)
            h = h if r <= one else zero
            total += g * w * h
            dP[i, j] = g * ((one if q > zero else zero) + magnitude * h)
        dtau[i, 0] = -total


def hard_gradient(dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
    """As ``thresholds_torch.hard_gradient``."""
    _over_rows(_hard_gradient, (dP, W, tau, dtau))


@compiled
def _soft_project(W, tau, out, shrinkage):  # type: ignore[no-untyped-def]
    zero, part = W.dtype.type(0), W.dtype.type(shrinkage)
    for i in range(W.shape[0]):
        t = tau[i, 0]
        for j in range(W.shape[1]):
            w = W[i, j]
            out[i, j] = zero if abs(w) <= t else w - part * min(max(w, -t), t)  # NaN stays NaN


def soft_project(W: Tensor, tau: Tensor, out: Tensor, shrinkage: float = 1.0) -> None:
    """As ``thresholds_torch.soft_project``."""
    _over_rows(_soft_project, (W, tau, out), shrinkage)


@compiled
def _soft_gradient(dP, W, tau, dtau, alpha):  # type: ignore[no-untyped-def]
    one, zero = W.dtype.type(1), W.dtype.type(0)
    rest = W.dtype.type(alpha)
    for i in range(W.shape[0]):
        t = tau[i, 0]
        total = zero
        for j in range(W.shape[1]):
            w = W[i, j]
            g = dP[i, j] * (one if abs(w) > t else rest)
            total += g if w > zero else (-g if w < zero else zero)
            dP[i, j] = g
        dtau[i, 0] = -total


def soft_gradient(dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
    """As ``thresholds_torch.soft_gradient``."""
    _over_rows(_soft_gradient, (dP, W, tau, dtau), alpha)


@compiled
def _backward_mask(G, tau, bits, weighted, plain, moments):  # type: ignore[no-untyped-def]
    real = G.dtype.type
    one, zero, two, four, tail, tiny = real(1), real(0), real(2), real(4), real(0.4), real(TINY)
    out, n = G.shape
    mask = np.zeros(8 * bits.shape[1], np.uint8)
    words, gather, shift = mask.view(np.uint64), np.uint64(GATHER), np.uint64(56)
    for i in range(out):
        t = tau[i, 0]
        total = zero
        for j in range(n):
            total += abs(G[i, j])
        scale = zero if total < tiny else one / total
        a, b, c, d = zero, zero, zero, zero
        for j in range(n):
            g = G[i, j]
            q = abs(g) * scale - t
            r = abs(q)
            h = max(two - four * r, tail)
            h = h if r <= one else zero
            keep = q >= zero
            mask[j] = keep
            kept = g if keep else g * zero  # NaN stays NaN
            G[i, j] = kept
            a += kept * g * h
            b += g * h
            c += kept
            d += kept * kept
        for k in range(words.size):
            bits[i, k] = (words[k] * gather) >> shift
        weighted[i, 0] = a
        plain[i, 0] = b
        moments[i, 0] = c
        moments[i, 1] = d


@compiled
def _add_moments(rows, total):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        total[0] += rows[i, 0]
        total[1] += rows[i, 1]


def backward_mask(G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor) -> None:
    """As ``thresholds_torch.backward_mask``."""
    of_rows = torch.empty((len(G), 2), dtype=torch.float64)  # added up in the same order by any number of threads
    _over_rows(_backward_mask, (G, tau, bits, weighted, plain, of_rows))
    _add_moments(of_rows.numpy(), moments.numpy())


@compiled
def _near(W, low, high):  # type: ignore[no-untyped-def]
    real = W.dtype.type
    one, zero, lo, hi = real(1), real(0), real(low), real(high)
    found, k, not_above = np.empty(16 * _NEAR), 0, 0  # grows as it fills
    rest = W.size // _NEAR * _NEAR
    for start in range(0, rest, _NEAR):
        up_to_high, up_to_low = zero, zero
        for j in range(_NEAR):  # of a length that the compiler knows
            magnitude = abs(W[start + j])
            up_to_high += one if magnitude <= hi else zero
            up_to_low += one if magnitude <= lo else zero
        not_above += int(up_to_high)
        if up_to_high == up_to_low:
            continue
        if k + 2 * _NEAR > found.size:  # for these, and for what is left after the last
            found = np.concatenate((found, np.empty_like(found)))
        for j in range(_NEAR):
            magnitude = abs(W[start + j])
            if lo < magnitude <= hi:
                found[k] = magnitude
                k += 1
    for j in range(rest, W.size):
        magnitude = abs(W[j])
        not_above += magnitude <= hi
        if lo < magnitude <= hi:
            found[k] = magnitude
            k += 1
    return W.size - not_above, found[:k]


def near(W: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """As ``thresholds_torch.near``."""
    found = _over_rows(_near, (W.reshape(-1),), low, high)
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    above, magnitudes = zip(*found, strict=True)
    return sum(above), np.concatenate(magnitudes)


@compiled
def _occupied(P):  # type: ignore[no-untyped-def]
    found, empty = np.ones(P.shape[0], np.bool_), 0
    for i in range(P.shape[0]):
        some = False
        for j in range(P.shape[1]):
            if P[i, j] != 0:
                some = True
                break
        if not some:
            found[i] = False
            empty += 1
    return empty, found


def occupied(P: Tensor) -> tuple[int, Tensor]:
    """As ``thresholds_torch.occupied``."""
    empty, found = _occupied(P.numpy())
    return empty, torch.from_numpy(found)


@compiled
def _add_rows(x, out):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i, 0]
    out[0] = total


def add_rows(x: Tensor, out: Tensor) -> None:
    """As ``thresholds_torch.add_rows``."""
    _add_rows(x.numpy(), out.numpy())


@compiled
def _through_abs(dt, t):  # type: ignore[no-untyped-def]
    for i in range(t.size):
        dt[i] = -dt[i] if t[i] < 0 else dt[i]


def through_abs(dt: Tensor, t: Tensor) -> None:
    """As ``thresholds_torch.through_abs``."""
    _through_abs(dt.numpy(), t.numpy())


@compiled
def _through_sigmoid(dt, t):  # type: ignore[no-untyped-def]
    one = t.dtype.type(1)
    for i in range(t.size):
        T = one / (one + np.exp(-t[i]))
        dt[i] *= T * (one - T)


def through_sigmoid(dt: Tensor, t: Tensor) -> None:
    """As ``thresholds_torch.through_sigmoid``."""
    _through_sigmoid(dt.numpy(), t.numpy())


@compiled
def _exponential_penalty(dt, t, alpha):  # type: ignore[no-untyped-def]
    factor = dt.dtype.type(alpha)
    for i in range(t.size):
        dt[i] -= factor * np.exp(-t[i])


def exponential_penalty(dt: Tensor, t: Tensor, alpha: float) -> None:
    """As ``thresholds_torch.exponential_penalty``."""
    _exponential_penalty(dt.numpy(), t.numpy(), alpha)


@compiled
def _variance_penalty(weighted, plain, moments, N, beta):  # type: ignore[no-untyped-def]
    real = weighted.dtype.type
    m = moments[0] / N
    square = (moments[1] - m * moments[0]) * (N - 1)
    factor = real(-beta / np.sqrt(square) if 0 < square < np.inf else 0.0)
    mean = real(m)
    for i in range(weighted.size):
        weighted[i] = (weighted[i] - mean * plain[i]) * factor


def variance_penalty(weighted: Tensor, plain: Tensor, moments: Tensor, N: int, beta: float) -> None:
    """As ``thresholds_torch.variance_penalty``."""
    _variance_penalty(weighted.numpy(), plain.numpy(), moments.numpy(), N, beta)


@compiled
def _known_finite(x):  # type: ignore[no-untyped-def]
    total = x.dtype.type(0)
    for i in range(x.size):
        total += abs(x[i])
    return total < np.inf


def known_finite(x: Tensor) -> bool:
    """As ``thresholds_torch.known_finite``."""
    return bool(_known_finite(x.numpy()))
