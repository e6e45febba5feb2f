"""How numba compiles the loops of this room, and the threads that they are shared among."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

__all__ = ["REORDERED", "compiled", "over_rows", "pool"]

#: sums may be reordered (SIMD) and products fused; NaN and infinity keep their meaning
REORDERED = ("reassoc", "contract", "nsz")

_SHARED_FROM = 1 << 18  # products

compiled = numba.njit(nogil=True, cache=True, fastmath=set(REORDERED), error_model="numpy")


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of so many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="lightning_sparse")


def over_rows(kernel: Callable[..., None], crow: Any, products: int, *arguments: Any) -> None:
    """Run ``kernel(first, last, *arguments)`` for all rows of a matrix, shared among torch's threads if there is much.

    Args:
        kernel: computes some rows.
        crow: where each row begins among the nonzeros, and where the last one ends, ``(rows + 1,)``.
        products: number of products that a nonzero takes.
        arguments: further ones of the kernel.
    """
    rows, nonzeros = len(crow) - 1, int(crow[-1])
    threads = 1 if nonzeros * products < _SHARED_FROM else min(torch.get_num_threads(), rows)
    if threads == 1:
        kernel(0, rows, *arguments)
        return
    shares = np.searchsorted(crow, np.linspace(0, nonzeros, threads + 1)[1:-1]).tolist()
    jobs = [pool(threads).submit(kernel, first, last, *arguments) for first, last in pairwise([0, *shares, rows])]
    for job in jobs:
        job.result()
