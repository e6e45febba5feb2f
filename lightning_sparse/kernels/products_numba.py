"""Products with a CSR matrix as compiled loops (extra ``fast``): the functions of ``products_torch`` on CPU.

Each element of a product is added up in the order of the columns and depends on its row alone, so rows may be shared
among threads without changing a bit.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sparse.kernels.numba_compiler import compiled, over_rows
from lightning_sparse.kernels.structure import CSR
from lightning_sparse.kernels.vectors_numba import add_row, transpose_block

if TYPE_CHECKING:
    from lightning_sparse.kernels import products_numba as this
    from lightning_sparse.kernels.products import Products

    checked: Products = this

__all__ = ["matmul", "sampled", "transposed"]

# bytes of a row of X that are multiplied at once: the registers hold as many sums beside what is added
_VECTOR = 512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 256
_LINE = 64  # bytes of a row that are transposed at once: a line of the cache is read and written as a whole
_CACHED = 1 << 20  # bytes of X at once, if it pays: rows that come again are still in the cache
_REPAYS = 32  # nonzeros of a row, on average, for which it pays to copy it, or to read and write it once more


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """As ``products_torch.matmul``."""
    Y = X.new_zeros(csr.shape[0], X.shape[1])
    for block in _blocks(csr, X):
        y = block.take(Y)
        block.multiply("matmul_added", csr, values, block.take(X), y)
        block.put(y, Y)
    return Y


def sampled(csr: CSR, G: Tensor, X: Tensor) -> Tensor:
    """As ``products_torch.sampled``."""
    out = X.new_zeros(len(csr.col))
    for block in _blocks(csr, X):
        block.multiply("sampled", csr, block.take(G), block.take(X), out)
    return out


def transposed(X: Tensor) -> Tensor:
    """As ``products_torch.transposed``."""
    if X.t().is_contiguous():
        return X.t()
    out = X.new_empty(X.shape[1], X.shape[0])
    _transpose(X.detach().contiguous().numpy(), out.numpy())
    return out


class _Block(NamedTuple):
    """Columns of ``X`` that one call of a kernel multiplies.

    Attributes:
        width: how many a vector holds.
        low: the first of them.
        high: the one after the last.
        packed: they are copied side by side, and filled up with zeros to one vector. The cache has room for more rows.
        edges: of the matrix' rows in each tile, as ``_edges`` returns them.
    """

    width: int
    low: int
    high: int
    packed: bool
    edges: Any

    def take(self, X: Tensor) -> Tensor:
        """Return the array that has these columns of ``X``: ``X`` itself, or a copy."""
        return pad(X[:, self.low : self.high], (0, self.low + self.width - self.high)) if self.packed else X

    def put(self, part: Tensor, Y: Tensor) -> None:
        """Write what ``take`` returned back to ``Y``, if it is a copy."""
        if self.packed:
            Y[:, self.low : self.high] = part[:, : self.high - self.low]

    def multiply(self, product: str, csr: CSR, a: Tensor, x: Tensor, b: Tensor) -> None:
        """Add the product to ``b``, as ``add_row`` does; all arrays of columns are as ``take`` returns them."""
        columns = (0, self.width) if self.packed else (self.low, self.high)
        crow, *arrays = (t.contiguous().numpy() for t in (csr.crow, csr.col, a, x, b))
        kernel = _kernel(product, self.width, x.element_size())
        over_rows(kernel, crow, self.high - self.low, self.edges, *arrays, *columns)


def _blocks(csr: CSR, X: Tensor) -> Iterator[_Block]:
    """Yield the blocks of the columns of ``X``."""
    n, widest = X.shape[1], _VECTOR // X.element_size()
    packed = len(csr.col) >= _REPAYS * max(csr.shape)
    for width, low, high in _widths(n, widest, filled=packed):
        size = len(X) * width * X.element_size()
        tiles = max(1, min(-(-size // _CACHED), len(csr.col) // (_REPAYS * csr.shape[0])))
        edges = _edges(csr.crow.contiguous().numpy(), csr.col.contiguous().numpy(), tiles, -(-len(X) // tiles))
        step = width if packed else high - low
        for start in range(low, high, step):
            yield _Block(width, start, min(start + step, high), packed and n != width, edges)


def _widths(n: int, widest: int, filled: bool) -> Iterator[tuple[int, int, int]]:
    """Yield a width of vectors, a power of 2, and the columns for it, from where to where.

    As many as fill the widest; what is left in one that need not be full, or in some of half the size, and so on.

    >>> list(_widths(150, 64, filled=True)), list(_widths(150, 64, filled=False))
    ([(64, 0, 128), (32, 128, 150)], [(64, 0, 128), (16, 128, 144), (4, 144, 148), (2, 148, 150)])
    """
    width, low = widest, 0
    while low < n:
        left = n - low
        if filled:
            width = min(widest, 1 << (left - 1).bit_length())
        high = n if filled and left < width else n - left % width
        if low < high:
            yield width, low, high
        width, low = width // 2, high


@compiled
def _edges(crow, col, tiles, size):  # type: ignore[no-untyped-def]
    """Return where each row begins in each tile of ``size`` columns, and where it ends: ``(tiles + 1, rows)``."""
    edges = np.empty((tiles + 1, crow.size - 1), np.int32)
    edges[0], edges[tiles] = crow[:-1], crow[1:]
    for i in range(crow.size - 1):
        for tile in range(1, tiles):
            start = edges[tile - 1, i]
            edges[tile, i] = start + np.searchsorted(col[start : crow[i + 1]], tile * size)
    return edges


@cache
def _kernel(product: str, width: int, itemsize: int) -> Callable[..., None]:
    size = width * itemsize

    @compiled
    def kernel(first, last, edges, col, a, X, b, low, high):  # type: ignore[no-untyped-def]
        n = X.shape[1]
        for start in range(low, high, width):
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    begin, end = edges[tile, i], edges[tile + 1, i]
                    add_row(product, size, begin, end, col, n, a, X, b, (start,), (start,), i * n)  # type: ignore[call-arg]

    return kernel  # type: ignore[no-any-return]


@compiled
def _transpose(X, out):  # type: ignore[no-untyped-def]
    width = _LINE // X.itemsize
    rows, columns = len(X) // width * width, len(out) // width * width
    source, target = X.reshape(-1), out.reshape(-1)
    xs, outs = np.empty(width, np.int64), np.empty(width, np.int64)
    for j in range(0, columns, width):
        for i in range(0, rows, width):
            for k in range(width):
                xs[k], outs[k] = (i + k) * len(out) + j, (j + k) * len(X) + i
            transpose_block(_LINE, source, xs, target, outs)  # type: ignore[call-arg]
    for i in range(len(X)):
        for j in range(columns if i < rows else 0, len(out)):
            out[j, i] = X[i, j]
