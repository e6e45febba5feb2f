"""Thresholding as one compiled loop each (extra ``fast``): the functions of ``torch_kernels`` on CPU, ``tau (out, 1)``.

A row's result depends on that row alone, so rows may be shared among threads without changing a bit.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["backward_mask", "hard_gradient", "hard_project", "soft_gradient", "soft_project"]

# Sums may be reordered (SIMD) and products fused; NaN and infinity keep their meaning.
_compile = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
_SHARED_FROM = 1 << 18


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lightning_sparse")


def _over_rows(kernel: Callable[..., Any], arrays: tuple[Any, ...], *scalars: Any) -> list[Any]:
    """Run ``kernel(*rows of arrays, *scalars)``, on torch's number of threads where the matrix is large."""
    if arrays[0].size < _SHARED_FROM:
        return [kernel(*arrays, *scalars)]
    out = len(arrays[0])
    threads = min(torch.get_num_threads(), out)
    if threads == 1:
        return [kernel(*arrays, *scalars)]
    edges = [out * i // threads for i in range(threads + 1)]
    jobs = [_pool(threads).submit(kernel, *(array[a:b] for array in arrays), *scalars) for a, b in pairwise(edges)]
    return [job.result() for job in jobs]


def _vector(tau: Tensor) -> Any:
    return tau.numpy().reshape(-1)


@_compile
def _hard_project(W, tau, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(W.shape[0]):
        t = tau[i]
        for j in range(W.shape[1]):
            keep = not abs(W[i, j]) <= t  # NaN stays NaN, for the user to see
            out[i, j] = W[i, j] if keep else W.dtype.type(0)
            count += keep
    return count


def hard_project(W: Tensor, tau: Tensor, out: Tensor) -> int:
    """As ``torch_kernels.hard_project``."""
    return sum(_over_rows(_hard_project, (W.numpy(), _vector(tau), out.numpy())))


@_compile
def _hard_gradient(dP, W, tau, dtau):  # type: ignore[no-untyped-def]
    real = W.dtype.type
    one, zero, two, four, tail = real(1), real(0), real(2), real(4), real(0.4)
    for i in range(W.shape[0]):
        t = tau[i]
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
        dtau[i] = -total


def hard_gradient(dP: Tensor, W: Tensor, tau: Tensor) -> Tensor:
    """As ``torch_kernels.hard_gradient``."""
    dtau = torch.empty(tau.shape, dtype=tau.dtype)
    _over_rows(_hard_gradient, (dP.numpy(), W.numpy(), _vector(tau), dtau.numpy().reshape(-1)))
    return dtau


@_compile
def _soft_project(W, tau, out):  # type: ignore[no-untyped-def]
    for i in range(W.shape[0]):
        t = tau[i]
        for j in range(W.shape[1]):
            w = W[i, j]
            out[i, j] = w - min(max(w, -t), t)


def soft_project(W: Tensor, tau: Tensor, out: Tensor) -> None:
    """As ``torch_kernels.soft_project``."""
    _over_rows(_soft_project, (W.numpy(), _vector(tau), out.numpy()))


@_compile
def _soft_gradient(dP, W, tau, dtau, alpha):  # type: ignore[no-untyped-def]
    one, zero = W.dtype.type(1), W.dtype.type(0)
    rest = W.dtype.type(alpha)
    for i in range(W.shape[0]):
        t = tau[i]
        total = zero
        for j in range(W.shape[1]):
            w = W[i, j]
            g = dP[i, j] * (one if abs(w) > t else rest)
            total += g if w > zero else (-g if w < zero else zero)
            dP[i, j] = g
        dtau[i] = -total


def soft_gradient(dP: Tensor, W: Tensor, tau: Tensor, alpha: float) -> Tensor:
    """As ``torch_kernels.soft_gradient``."""
    dtau = torch.empty(tau.shape, dtype=tau.dtype)
    _over_rows(_soft_gradient, (dP.numpy(), W.numpy(), _vector(tau), dtau.numpy().reshape(-1)), alpha)
    return dtau


@_compile
def _backward_mask(G, tau, mask, weighted, plain, moments):  # type: ignore[no-untyped-def]
    real = G.dtype.type
    one, zero, two, four, tail = real(1), real(0), real(2), real(4), real(0.4)
    for i in range(G.shape[0]):
        t = tau[i]
        total = zero
        for j in range(G.shape[1]):
            total += abs(G[i, j])
        scale = one / total if total != zero else zero
        first, second, a, b = zero, zero, zero, zero
        for j in range(G.shape[1]):
            g = G[i, j]
            d = abs(g) * scale - t
            r = abs(d)
            h = max(two - four * r, tail)
            h = h if r <= one else zero
            keep = d >= zero
            mask[i, j] = keep
            kept = g if keep else g * zero  # NaN stays NaN
            G[i, j] = kept
            b += g * h
            a += kept * g * h
            first += kept
            second += kept * kept
        weighted[i] = a
        plain[i] = b
        moments[i, 0] = first
        moments[i, 1] = second


def backward_mask(G: Tensor, tau: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch_kernels.backward_mask``."""
    weighted, plain = (torch.empty(tau.shape, dtype=tau.dtype) for _ in range(2))
    moments = np.empty((G.shape[0], 2))
    sums = weighted.numpy().reshape(-1), plain.numpy().reshape(-1), moments
    _over_rows(_backward_mask, (G.numpy(), _vector(tau), mask.numpy(), *sums))
    return weighted, plain, torch.from_numpy(moments.sum(0))
