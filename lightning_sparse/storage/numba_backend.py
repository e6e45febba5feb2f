"""Products with a CSR matrix as compiled loops (extra ``fast``): the functions of ``torch_backend`` on CPU.

A row's result depends on that row alone, so rows may be shared among threads without changing a bit.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.numba_kernels import _compile, _pool
from lightning_sparse.storage.structure import CSR

__all__ = ["matmul", "sampled"]

_BLOCK = 256  # columns of X at once: rows that come again are still in the cache
_SHARED_FROM = 1 << 18  # products


def _over_rows(kernel: Callable[..., None], crow: Any, n: int, *arrays: Any) -> None:
    """Run ``kernel(first row, row after the last, crow, *arrays)``, on torch's number of threads if there is much."""
    rows, products = len(crow) - 1, int(crow[-1]) * n
    threads = 1 if products < _SHARED_FROM else min(torch.get_num_threads(), rows)
    if threads == 1:
        kernel(0, rows, crow, *arrays)
        return
    edges = np.searchsorted(crow, np.linspace(0, crow[-1], threads + 1)[1:-1]).tolist()
    jobs = [_pool(threads).submit(kernel, a, b, crow, *arrays) for a, b in pairwise([0, *edges, rows])]
    for job in jobs:
        job.result()


@_compile
def _matmul(first, last, crow, col, values, X, Y, block):  # type: ignore[no-untyped-def]
    n = X.shape[1]
    for low in range(0, n, block):
        high = min(n, low + block)
        for i in range(first, last):
            y = Y[i, low:high]
            for b in range(y.size):
                y[b] = 0
            p, end = crow[i], crow[i + 1]
            while p + 4 <= end:  # four at a time: y is read and written once for all of them
                v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
                x0, x1 = X[col[p], low:high], X[col[p + 1], low:high]
                x2, x3 = X[col[p + 2], low:high], X[col[p + 3], low:high]
                for b in range(y.size):
                    y[b] += v0 * x0[b] + v1 * x1[b] + v2 * x2[b] + v3 * x3[b]
                p += 4
            while p < end:
                v0, x0 = values[p], X[col[p], low:high]
                for b in range(y.size):
                    y[b] += v0 * x0[b]
                p += 1


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """As ``torch_backend.matmul``."""
    Y = X.new_empty(csr.shape[0], X.shape[1])
    _over_rows(_matmul, csr.crow.numpy(), X.shape[1], csr.col.numpy(), values.numpy(), X.numpy(), Y.numpy(), _BLOCK)
    return Y


@_compile
def _sampled(first, last, crow, col, G, X, out, block):  # type: ignore[no-untyped-def]
    n = X.shape[1]
    for low in range(0, n, block):
        high = min(n, low + block)
        for i in range(first, last):
            g = G[i, low:high]
            for p in range(crow[i], crow[i + 1]):
                x = X[col[p], low:high]
                total = X.dtype.type(0)
                for b in range(g.size):
                    total += g[b] * x[b]
                out[p] += total


def sampled(csr: CSR, G: Tensor, X: Tensor) -> Tensor:
    """As ``torch_backend.sampled``."""
    out = X.new_zeros(len(csr.col))
    _over_rows(_sampled, csr.crow.numpy(), X.shape[1], csr.col.numpy(), G.numpy(), X.numpy(), out.numpy(), _BLOCK)
    return out
