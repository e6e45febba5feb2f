"""Products with a matrix of blocks as compiled loops (extra ``fast``): the functions of ``blocks_torch`` on CPU.

Each block is multiplied with a *panel*: its features of all inputs, side by side, ``(n, C)``. It fits into the cache
beside the one that the results are added to. A row of the result is added up by one thread, in the order of the blocks,
so the number of threads changes no bit.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.numba_compiler import compiled, over_rows
from lightning_sparse.kernels.structure import Structure
from lightning_sparse.kernels.vectors_numba import add_product

if TYPE_CHECKING:
    from lightning_sparse.kernels import blocks_numba as this
    from lightning_sparse.kernels.blocks import BlockProducts

    checked: BlockProducts = this

__all__ = ["gradient", "matmul", "matmul_transposed"]

# bytes of sums that the registers hold beside what is added, and how much of a row of them is one vector
_SUMS = 512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 256
_VECTOR = _SUMS // 4


def matmul(x: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.matmul``."""
    (rows, columns), (crow, col, (down, _)) = weight.block, weight.matrix
    y = x.new_zeros(down, len(x), rows)
    _run(_matmul, rows, crow, len(x) * columns, crow, col, values, _panels(x, columns), y)
    return _unpacked(y)


def matmul_transposed(delta: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.matmul_transposed``."""
    (rows, columns), (crow, col, (across, _)) = weight.block, weight.transposed
    dx = delta.new_zeros(across, len(delta), columns)
    where = crow, col, weight.permutation, weight.matrix.crow
    _run(_matmul_transposed, columns, crow, len(delta) * rows, *where, values, _panels(delta, rows), dx)
    return _unpacked(dx)


def gradient(delta: Tensor, x: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.gradient``."""
    (rows, columns), (crow, col, _) = weight.block, weight.matrix
    dvalues = x.new_zeros(len(col) * rows * columns)
    panels = _panels(delta, rows), _panels(x, columns)
    _run(_gradient, columns, crow, len(x) * rows, crow, col, *panels, dvalues)
    return dvalues


def _run(
    kernels: Callable[[int, int], Callable[..., None]], width: int, crow: Tensor, n: int, *tensors: Tensor
) -> None:
    """Compute with vectors that make up rows of this width; ``n`` products with each element of one."""
    starts, *arrays = (tensor.detach().contiguous().numpy() for tensor in (crow, *tensors))
    itemsize = tensors[-1].element_size()
    for vector, low in _pieces(width, itemsize):
        over_rows(kernels(vector, itemsize), starts, n * vector, *arrays, low)


def _panels(x: Tensor, width: int) -> Tensor:
    """Return ``(n, features)`` as ``(features / width, n, width)``."""
    return torch.unflatten(x.detach(), 1, (-1, width)).transpose(0, 1).contiguous()


def _unpacked(panels: Tensor) -> Tensor:
    """Return panels as ``(n, features)``."""
    return panels.transpose(0, 1).flatten(1)


def _pieces(width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield the widths of vectors, powers of 2, that make up a row of a block, and where each begins.

    >>> list(_pieces(21, _VECTOR // 8))
    [(8, 0), (8, 8), (4, 16), (1, 20)]
    """
    low, widest = 0, _VECTOR // itemsize
    while low < width:
        piece = min(widest, 1 << ((width - low).bit_length() - 1))
        yield piece, low
        low += piece


def _height(size: int) -> int:
    """Return how many vectors of sums of so many bytes the registers hold."""
    return min(8, _SUMS // size)


@cache
def _matmul(width: int, itemsize: int) -> Callable[..., None]:
    size, height = width * itemsize, _height(width * itemsize)

    @compiled
    def kernel(first, last, crow, col, values, X, Y, low):  # type: ignore[no-untyped-def]
        n, C, R = X.shape[1], X.shape[2], Y.shape[2]
        x, y = X.reshape(-1), Y.reshape(-1)
        longest = 0
        for i in range(first, last):
            longest = max(longest, crow[i + 1] - crow[i])
        W = np.empty(longest * C * width, x.dtype)  # some outputs of a row of blocks, transposed
        for i in range(first, last):
            wide = (crow[i + 1] - crow[i]) * C
            for r in range(width):
                start = crow[i] * R * C + (low + r) * wide
                for c in range(wide):
                    W[c * width + r] = values[start + c]
            for j in range(crow[i], crow[i + 1]):
                w = (j - crow[i]) * C * width
                add_product(  # type: ignore[call-arg]
                    height, size, n, C, x, col[j] * n * C, C, 1, W, w, width, y, i * n * R + low, R
                )

    return kernel  # type: ignore[no-any-return]


@cache
def _matmul_transposed(width: int, itemsize: int) -> Callable[..., None]:
    size, height = width * itemsize, _height(width * itemsize)

    @compiled
    def kernel(first, last, crow, col, permutation, starts, values, G, dX, low):  # type: ignore[no-untyped-def]
        n, R, C = G.shape[1], G.shape[2], dX.shape[2]
        g, dx = G.reshape(-1), dX.reshape(-1)
        for j in range(first, last):
            for p in range(crow[j], crow[j + 1]):
                i = col[p]
                w = starts[i] * R * C + (permutation[p] - starts[i]) * C + low
                wide = (starts[i + 1] - starts[i]) * C
                add_product(  # type: ignore[call-arg]
                    height, size, n, R, g, i * n * R, R, 1, values, w, wide, dx, j * n * C + low, C
                )

    return kernel  # type: ignore[no-any-return]


@cache
def _gradient(width: int, itemsize: int) -> Callable[..., None]:
    size, height = width * itemsize, _height(width * itemsize)

    @compiled
    def kernel(first, last, crow, col, G, X, dvalues, low):  # type: ignore[no-untyped-def]
        n, R, C = G.shape[1], G.shape[2], X.shape[2]
        g, x = G.reshape(-1), X.reshape(-1)
        for i in range(first, last):
            wide = (crow[i + 1] - crow[i]) * C
            for j in range(crow[i], crow[i + 1]):
                w = crow[i] * R * C + (j - crow[i]) * C + low
                add_product(  # type: ignore[call-arg]
                    height, size, R, n, g, i * n * R, 1, R, x, col[j] * n * C + low, C, dvalues, w, wide
                )

    return kernel  # type: ignore[no-any-return]
