"""Products with a CSR matrix as compiled loops (extra ``fast``): the functions of ``products_torch`` on CPU.

What repeats for every nonzero is written in LLVM's vectors, which become whatever registers the processor has. Each
element of a product is added up in the order of the columns and depends on its row alone, so rows may be shared among
threads without changing a bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from lightning_sparse.kernels.numba_compiler import REORDERED, compiled, pool
from lightning_sparse.kernels.structure import CSR

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
_SHARED_FROM = 1 << 18  # products


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """As ``products_torch.matmul``."""
    Y = X.new_zeros(csr.shape[0], X.shape[1])
    for block in _blocks(csr, X):
        y = block.take(Y)
        block.multiply("matmul", csr, values, block.take(X), y)
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
    _transpose(_LINE // X.element_size())(X.detach().contiguous().numpy(), out.numpy())
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
        """Add the product to ``b``, as ``_add_row`` does; all arrays of columns are as ``take`` returns them."""
        columns = (0, self.width) if self.packed else (self.low, self.high)
        arrays = (t.contiguous().numpy() for t in (csr.crow, csr.col, a, x, b))
        _over_rows(_kernel(product, self.width), self.high - self.low, self.edges, *arrays, *columns)


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


def _over_rows(kernel: Callable[..., None], n: int, edges: Any, crow: Any, *arguments: Any) -> None:
    """Run ``kernel(first, last, edges, *arguments)`` for all rows, shared among torch's threads if there is much."""
    rows, products = len(crow) - 1, int(crow[-1]) * n
    threads = 1 if products < _SHARED_FROM else min(torch.get_num_threads(), rows)
    if threads == 1:
        kernel(0, rows, edges, *arguments)
        return
    shares = np.searchsorted(crow, np.linspace(0, crow[-1], threads + 1)[1:-1]).tolist()
    jobs = [pool(threads).submit(kernel, a, b, edges, *arguments) for a, b in pairwise([0, *shares, rows])]
    for job in jobs:
        job.result()


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
def _kernel(product: str, width: int) -> Callable[..., None]:
    @compiled
    def kernel(first, last, edges, col, a, X, b, low, high):  # type: ignore[no-untyped-def]
        for start in range(low, high, width):
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    _add_row(product, width, edges[tile, i], edges[tile + 1, i], col, a, X, b, i, start)  # type: ignore[call-arg]

    return kernel  # type: ignore[no-any-return]


@cache
def _transpose(width: int) -> Callable[..., None]:
    @compiled
    def kernel(X, out):  # type: ignore[no-untyped-def]
        rows, columns = len(X) // width * width, len(out) // width * width
        for j in range(0, columns, width):
            for i in range(0, rows, width):
                _transpose_block(width, X, out, i, j)  # type: ignore[call-arg]
        for i in range(len(X)):
            for j in range(columns if i < rows else 0, len(out)):
                out[j, i] = X[i, j]

    return kernel  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- in vectors


@intrinsic(prefer_literal=True)
def _add_row(typing, product, width, first, last, col, a, X, b, i, low):  # type: ignore[no-untyped-def]
    """Add what the nonzeros ``p in range(first, last)`` of row ``i`` are due; ``x = X[col[p], low : low + width]``.

    - "matmul": ``b[i, low : low + width] += a[p] * x``
    - "sampled": ``b[p] += a[i, low : low + width] @ x``
    """

    def matmul(row: _Row) -> None:
        total = cgutils.alloca_once_value(row.builder, row.load(row.b, row.start))  # type: ignore[no-untyped-call]
        with row.nonzeros() as (p, x):
            value = row.filled(row.builder.load(row.builder.gep(row.a, [p])))
            row.builder.store(row.add(row.builder.load(total), row.multiply(value, x)), total)
        row.store(row.builder.load(total), row.b, row.start)

    def sampled(row: _Row) -> None:
        g = row.load(row.a, row.start)
        with row.nonzeros() as (p, x):
            at = row.builder.gep(row.b, [p])
            row.builder.store(row.add(row.builder.load(at), row.sum(row.multiply(g, x))), at)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row = _Row(context, builder, signature, arguments)
        {"matmul": matmul, "sampled": sampled}[product.literal_value](row)
        return context.get_dummy_value()

    index = types.intp
    return types.void(product, width, index, index, col, a, X, b, index, index), generate


@intrinsic(prefer_literal=True)
def _transpose_block(typing, width, X, out, i, j):  # type: ignore[no-untyped-def]
    """``out[j : j + width, i : i + width] = X[i : i + width, j : j + width].T``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds, (_, *arrays, i, j) = signature.args[1:3], arguments
        X, out = (context.make_array(kind)(context, builder, x) for kind, x in zip(kinds, arrays, strict=True))
        vectors, size = _Vectors(context, builder, kinds[0].dtype, width.literal_value), width.literal_value

        def starts(array: Any, row: Any, column: Any) -> list[Any]:
            n = builder.extract_value(array.shape, 1)
            first = builder.add(builder.mul(row, n), column)
            return [builder.add(first, builder.mul(n, n.type(k))) for k in range(size)]

        rows = [vectors.load(X.data, start) for start in starts(X, i, j)]
        for _ in range(size.bit_length() - 1):  # each turn moves one bit of the row's number to the column's
            pairs = zip(rows[: size // 2], rows[size // 2 :], strict=True)
            rows = [row for pair in pairs for row in vectors.interleaved(*pair)]
        for row, start in zip(rows, starts(out, j, i), strict=True):
            vectors.store(row, out.data, start)
        return context.get_dummy_value()

    return types.void(width, X, out, types.intp, types.intp), generate


class _Vectors:
    """Code for vectors of ``width`` elements, a power of 2, of this type of numba's."""

    def __init__(self, context: Any, builder: Any, dtype: Any, width: int) -> None:
        self.builder, self._width = builder, width
        self._element = context.get_value_type(dtype)
        self._size = context.get_abi_sizeof(self._element)
        self._vector = ir.VectorType(self._element, width)

    def load(self, pointer: Any, start: Any) -> Any:
        return self.builder.load(self._at(pointer, start), align=self._size)

    def store(self, vector: Any, pointer: Any, start: Any) -> None:
        self.builder.store(vector, self._at(pointer, start), align=self._size)

    def filled(self, scalar: Any) -> Any:
        none = ir.Constant(self._vector, ir.Undefined)
        return self._picked(self.builder.insert_element(none, scalar, ir.IntType(32)(0)), none, [0] * self._width)

    def interleaved(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return the elements of both in turn: those of the first halves, and of the second."""
        order = [x for k in range(self._width) for x in (k, self._width + k)]
        return self._picked(a, b, order[: self._width]), self._picked(a, b, order[self._width :])

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=REORDERED)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=REORDERED)

    def sum(self, vector: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self._width}{self._element.intrinsic_name}"
        kind = ir.FunctionType(self._element, [self._element, self._vector])
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)  # type: ignore[no-untyped-call]
        return self.builder.call(reduce, [self._element(-0.0), vector], fastmath=REORDERED)

    def _picked(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self._width), order))

    def _at(self, pointer: Any, start: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [start]), self._vector.as_pointer())


class _Row(_Vectors):
    """The code of ``_add_row``; arrays are contiguous, and vectors are of their elements.

    Attributes:
        a: pointer to the first element of that array.
        b: the same.
        start: of row ``i`` at column ``low`` in an array of the width of ``X``.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        _, width, _, _, *kinds, _, _ = signature.args
        _, _, self._first, self._last, *arrays, i, self._low = arguments
        super().__init__(context, builder, kinds[2].dtype, width.literal_value)
        col, a, X, b = (
            context.make_array(kind)(context, builder, array) for kind, array in zip(kinds, arrays, strict=True)
        )
        self._col, self.a, self._X, self.b = col.data, a.data, X.data, b.data
        self._n = builder.extract_value(X.shape, 1)
        self.start = builder.add(builder.mul(i, self._n), self._low)

    @contextmanager
    def nonzeros(self) -> Iterator[tuple[Any, Any]]:
        """Loop over the nonzeros: the code in the ``with`` gets a number, and what of X it is multiplied with."""
        builder, index = self.builder, self._first.type
        with cgutils.for_range_slice(builder, self._first, self._last, index(1), index) as (p, _):
            column = builder.sext(builder.load(builder.gep(self._col, [p])), index)
            yield p, self.load(self._X, builder.add(builder.mul(column, self._n), self._low))
