"""Linear products with the package's vectors beside plain loops, CPU time in turn: ``python docs/plain_loops.py``."""

import statistics
import time
from functools import cache, partial

import torch

from lightning_sparse.kernels import products_numba
from lightning_sparse.kernels.numba_compiler import compiled
from lightning_sparse.kernels.structure import structure
from lightning_sparse.rules import sampling

SIZE, BATCH, ROUNDS = 4096, 128, 5


@cache
def plain(product, width, itemsize):
    """Return what ``products_numba._kernel`` does, as loops that LLVM turns into vectors by itself."""

    @compiled
    def matmul(first, last, edges, col, a, X, b, low, high):
        for start in range(low, high, width):
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    y = b[i, start : start + width]
                    for p in range(edges[tile, i], edges[tile + 1, i]):
                        value, x = a[p], X[col[p], start : start + width]
                        for k in range(width):
                            y[k] += value * x[k]

    @compiled
    def sampled(first, last, edges, col, a, X, b, low, high):
        for start in range(low, high, width):
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    g = a[i, start : start + width]
                    for p in range(edges[tile, i], edges[tile + 1, i]):
                        x, total = X[col[p], start : start + width], b[p]
                        for k in range(width):
                            total += g[k] * x[k]
                        b[p] = total

    return sampled if product == "sampled" else matmul


def seconds(kernels, job):
    """Return the median CPU time of a product with each kernel."""
    times = [[] for _ in kernels]
    for _ in range(ROUNDS + 1):
        for kernel, taken in zip(kernels, times, strict=True):
            products_numba._kernel = kernel
            start = time.process_time()
            job()
            taken.append(time.process_time() - start)
    return [statistics.median(taken[1:]) for taken in times]  # the first compiles


torch.set_num_threads(1)
kernels = products_numba._kernel, plain
X, G = torch.randn(SIZE, BATCH), torch.randn(SIZE, BATCH)
for sparsity in (0.9, 0.98):
    count = round((1 - sparsity) * SIZE**2)
    weight = structure(sampling.distinct(count, SIZE**2, torch.Generator().manual_seed(0)), (SIZE, SIZE))
    values = torch.randn(count)
    jobs = {
        "forward": partial(products_numba.matmul, weight.matrix, values, X),
        "input gradient": partial(products_numba.matmul, weight.transposed, values, G),
        "values' gradient": partial(products_numba.sampled, weight.matrix, G, X),
    }
    for name, job in jobs.items():
        vectors, loops = seconds(kernels, job)
        print(
            f"{sparsity} {name:16s} {1e3 * vectors:.1f} ms, plain loops {1e3 * loops:.1f} ms: {vectors / loops:.2f}",
            flush=True,
        )
