"""How numba compiles the loops of this room, and the threads that they are shared among."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba

__all__ = ["REORDERED", "compiled", "pool"]

#: sums may be reordered (SIMD) and products fused; NaN and infinity keep their meaning
REORDERED = ("reassoc", "contract", "nsz")

compiled = numba.njit(nogil=True, cache=True, fastmath=set(REORDERED), error_model="numpy")


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of so many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="lightning_sparse")
