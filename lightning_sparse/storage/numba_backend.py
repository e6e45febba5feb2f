"""Products with a CSR matrix as compiled loops (extra ``fast``): the functions of ``torch_backend`` on CPU.

What repeats for every nonzero is written in LLVM's vectors, which become whatever registers the processor has. Each
element of a product is added up in the order of the columns and depends on its row alone, so rows may be shared among
threads without changing a bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from lightning_sparse.kernels.numba_kernels import _compile, _pool
from lightning_sparse.storage.structure import CSR

__all__ = ["matmul", "sampled"]

# bytes of a row of X that are multiplied at once: the registers hold as many sums beside what is added
_VECTOR = 512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 256
_CACHED = 1 << 20  # bytes of X at once, if it pays: rows that come again are still in the cache
_REPAYS = 32  # nonzeros of a row, on average, for which it pays to copy it, or to read and write it once more
_SHARED_FROM = 1 << 18  # products
_REORDERED = ("reassoc", "contract", "nsz")  # of sums and products, as in kernels.numba_kernels


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """As ``torch_backend.matmul``."""
    Y = X.new_zeros(csr.shape[0], X.shape[1])
    _multiply(_matmul, csr, values, X, Y)
    return Y


def sampled(csr: CSR, G: Tensor, X: Tensor) -> Tensor:
    """As ``torch_backend.sampled``."""
    out = X.new_zeros(len(csr.col))
    _multiply(_sampled, csr, G, X, out)
    return out


def _multiply(kernel: Callable[[int], Callable[..., None]], csr: CSR, a: Tensor, X: Tensor, b: Tensor) -> None:
    """Run the kernel of each width over its columns of ``X``.

    Where there are many nonzeros, the columns that a vector holds are copied side by side first: the cache has room for
    more of them, and the last ones can be filled up with zeros.
    """
    crow, col, *arrays = (x.contiguous().numpy() for x in (csr.crow, csr.col, a, X, b))
    copied = len(col) >= _REPAYS * max(csr.shape)
    for width, low, high in _blocks(X.shape[1], _VECTOR // X.element_size(), filled=copied):
        size = len(X) * width * X.element_size()
        tiles = max(1, min(-(-size // _CACHED), len(col) // (_REPAYS * csr.shape[0])))
        edges = _edges(crow, col, tiles, -(-len(X) // tiles))
        _over_rows(kernel(width), crow, high - low, edges, col, *arrays, low, high, copied)


def _blocks(n: int, widest: int, filled: bool) -> Iterator[tuple[int, int, int]]:
    """Yield a width of vectors, a power of 2, and the columns for it, from where to where.

    As many as fill the widest; what is left in one that need not be full, or in some of half the size, and so on.

    >>> list(_blocks(150, 64, filled=True)), list(_blocks(150, 64, filled=False))
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


def _over_rows(kernel: Callable[..., None], crow: Any, n: int, *arguments: Any) -> None:
    """Run ``kernel(first row, row after the last, *arguments)``, on torch's number of threads if there is much."""
    rows, products = len(crow) - 1, int(crow[-1]) * n
    threads = 1 if products < _SHARED_FROM else min(torch.get_num_threads(), rows)
    if threads == 1:
        kernel(0, rows, *arguments)
        return
    shares = np.searchsorted(crow, np.linspace(0, crow[-1], threads + 1)[1:-1]).tolist()
    jobs = [_pool(threads).submit(kernel, a, b, *arguments) for a, b in pairwise([0, *shares, rows])]
    for job in jobs:
        job.result()


@_compile
def _edges(crow, col, tiles, size):  # type: ignore[no-untyped-def]
    """Return where each row begins in each tile of ``size`` columns, and where it ends: ``(tiles + 1, rows)``."""
    edges = np.empty((tiles + 1, crow.size - 1), np.int32)
    edges[0], edges[tiles] = crow[:-1], crow[1:]
    for i in range(crow.size - 1):
        for tile in range(1, tiles):
            start = edges[tile - 1, i]
            edges[tile, i] = start + np.searchsorted(col[start : crow[i + 1]], tile * size)
    return edges


@_compile
def _part(X, width, copied):  # type: ignore[no-untyped-def]
    """Return a place for ``width`` columns of X, zeros; or X itself, if these are all or nothing is copied.

    It begins where a cache line does: no vector is in more lines than it must.
    """
    if X.shape[1] == width or not copied:
        return X
    size, line = len(X) * width, 64 // X.itemsize
    array = np.zeros(size + line, X.dtype)
    start = -(array.ctypes.data // X.itemsize) % line
    return array[start : start + size].reshape(len(X), width)


@_compile
def _read(part, X, low, high):  # type: ignore[no-untyped-def]
    """Copy these columns of X into their part."""
    if part.shape[1] != X.shape[1]:
        for i in range(len(X)):
            for j in range(high - low):
                part[i, j] = X[i, low + j]


@cache
def _matmul(width: int) -> Callable[..., None]:
    @_compile
    def kernel(first, last, edges, col, values, X, Y, low, high, copied):  # type: ignore[no-untyped-def]
        x, y = _part(X, width, copied), _part(Y, width, copied)
        for start in range(low, high, width):
            stop = min(start + width, high)
            _read(x, X, start, stop)
            at = 0 if copied else start
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    _add_product(width, edges[tile, i], edges[tile + 1, i], col, values, x, y, i, at)  # type: ignore[call-arg]
            if y.shape[1] != Y.shape[1]:
                for i in range(first, last):
                    for j in range(stop - start):
                        Y[i, start + j], y[i, j] = y[i, j], 0

    return kernel  # type: ignore[no-any-return]


@cache
def _sampled(width: int) -> Callable[..., None]:
    @_compile
    def kernel(first, last, edges, col, G, X, out, low, high, copied):  # type: ignore[no-untyped-def]
        g, x = _part(G, width, copied), _part(X, width, copied)
        for start in range(low, high, width):
            stop = min(start + width, high)
            _read(g, G, start, stop)
            _read(x, X, start, stop)
            at = 0 if copied else start
            for tile in range(len(edges) - 1):
                for i in range(first, last):
                    _add_dots(width, edges[tile, i], edges[tile + 1, i], col, g, x, out, i, at)  # type: ignore[call-arg]

    return kernel  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- one row, in vectors


@intrinsic(prefer_literal=True)
def _add_product(typing, width, first, last, col, values, X, Y, i, low):  # type: ignore[no-untyped-def]
    """``Y[i, low : low + width] += sum(values[p] * X[col[p], low : low + width] for p in range(first, last))``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row = _Row(context, builder, signature, arguments)
        total = cgutils.alloca_once_value(builder, row.load(row.b, row.start))  # type: ignore[no-untyped-call]
        with row.nonzeros() as (p, x):
            value = row.filled(builder.load(builder.gep(row.a, [p])))
            builder.store(row.add(builder.load(total), row.multiply(value, x)), total)
        row.store(builder.load(total), row.b, row.start)
        return context.get_dummy_value()

    return _signature(width, col, values, X, Y), generate


@intrinsic(prefer_literal=True)
def _add_dots(typing, width, first, last, col, G, X, out, i, low):  # type: ignore[no-untyped-def]
    """``out[p] += G[i, low : low + width] @ X[col[p], low : low + width]`` for all p in ``range(first, last)``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row = _Row(context, builder, signature, arguments)
        g = row.load(row.a, row.start)
        with row.nonzeros() as (p, x):
            at = builder.gep(row.b, [p])
            builder.store(row.add(builder.load(at), row.sum(row.multiply(g, x))), at)
        return context.get_dummy_value()

    return _signature(width, col, G, X, out), generate


def _signature(width: Any, col: Any, a: Any, X: Any, b: Any) -> Any:
    index = types.intp
    return types.void(width, index, index, col, a, X, b, index, index)


class _Row:
    """The code of a function with that signature; arrays are contiguous, and vectors are ``width`` of their elements.

    Attributes:
        a: pointer to the first element of that array.
        b: the same.
        start: of row ``i`` at column ``low`` in an array of the width of ``X``.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        width, _, _, *kinds, _, _ = signature.args
        _, self._first, self._last, *arrays, i, self._low = arguments
        self._builder, self._width = builder, width.literal_value
        col, a, X, b = (
            context.make_array(kind)(context, builder, array) for kind, array in zip(kinds, arrays, strict=True)
        )
        self._col, self.a, self._X, self.b = col.data, a.data, X.data, b.data
        self._n = builder.extract_value(X.shape, 1)
        self._element = context.get_value_type(kinds[2].dtype)
        self._size = context.get_abi_sizeof(self._element)
        self._vector = ir.VectorType(self._element, self._width)
        self.start = builder.add(builder.mul(i, self._n), self._low)

    @contextmanager
    def nonzeros(self) -> Iterator[tuple[Any, Any]]:
        """Loop over the nonzeros: the code in the ``with`` gets a number, and what of X it is multiplied with."""
        builder, index = self._builder, self._first.type
        with cgutils.for_range_slice(builder, self._first, self._last, index(1), index) as (p, _):
            column = builder.sext(builder.load(builder.gep(self._col, [p])), index)
            yield p, self.load(self._X, builder.add(builder.mul(column, self._n), self._low))

    def load(self, pointer: Any, start: Any) -> Any:
        return self._builder.load(self._at(pointer, start), align=self._size)

    def store(self, vector: Any, pointer: Any, start: Any) -> None:
        self._builder.store(vector, self._at(pointer, start), align=self._size)

    def filled(self, scalar: Any) -> Any:
        none, first = ir.Constant(self._vector, ir.Undefined), ir.IntType(32)(0)
        one = self._builder.insert_element(none, scalar, first)
        return self._builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(first.type, self._width), None))

    def multiply(self, a: Any, b: Any) -> Any:
        return self._builder.fmul(a, b, flags=_REORDERED)

    def add(self, a: Any, b: Any) -> Any:
        return self._builder.fadd(a, b, flags=_REORDERED)

    def sum(self, vector: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self._width}{self._element.intrinsic_name}"
        kind = ir.FunctionType(self._element, [self._element, self._vector])
        reduce = cgutils.get_or_insert_function(self._builder.module, kind, name)  # type: ignore[no-untyped-call]
        return self._builder.call(reduce, [self._element(-0.0), vector], fastmath=_REORDERED)

    def _at(self, pointer: Any, start: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(pointer, [start]), self._vector.as_pointer())
