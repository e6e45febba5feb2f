"""What repeats for every nonzero, written in LLVM's vectors, which become whatever registers the processor has.

Functions of numba call these like functions of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_sparse.kernels.numba_compiler import REORDERED

__all__ = ["add_product", "add_row", "transpose_block"]


@intrinsic(prefer_literal=True)
def add_row(typing, product, size, first, last, col, scale, a, X, b, xs, ys, start):  # type: ignore[no-untyped-def]
    """Multiply one row of a sparse matrix, of which ``p in range(first, last)`` are the nonzeros.

    ``x`` is made of pieces of ``size`` bytes that begin in ``X`` at ``xs[k] + col[p] * scale``. The pieces of ``y``
    begin at ``ys[k] + start``. With

    - "matmul", ``y = sum_p a[p] * x`` is written into ``b``,
    - "matmul_added", it is added to what is in ``b``,
    - "sampled", ``b[p] += y @ x``, and ``y`` is in ``a``.
    """

    def matmul(row: _Row) -> None:
        totals = [cgutils.alloca_once(row.builder, row.vector) for _ in ys]  # type: ignore[no-untyped-call]
        added = product.literal_value == "matmul_added"
        for total, y in zip(totals, row.ys, strict=True):
            row.builder.store(row.load(row.b, y) if added else row.filled(row.element(0.0)), total)
        with row.nonzeros() as (p, x):
            value = row.filled(row.builder.load(row.builder.gep(row.a, [p])))
            for total, piece in zip(totals, x, strict=True):
                row.builder.store(row.add(row.builder.load(total), row.multiply(value, piece)), total)
        for total, y in zip(totals, row.ys, strict=True):
            row.store(row.builder.load(total), row.b, y)

    def sampled(row: _Row) -> None:
        g = [row.load(row.a, y) for y in row.ys]
        with row.nonzeros() as (p, x):
            total = row.multiply(g[0], x[0])
            for ours, piece in zip(g[1:], x[1:], strict=True):
                total = row.add(total, row.multiply(ours, piece))
            at = row.builder.gep(row.b, [p])
            row.builder.store(row.add(row.builder.load(at), row.sum(total)), at)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row = _Row(context, builder, signature, arguments)
        {"matmul": matmul, "matmul_added": matmul, "sampled": sampled}[product.literal_value](row)
        return context.get_dummy_value()

    index = types.intp
    return types.void(product, size, index, index, col, index, a, X, b, xs, ys, index), generate


@intrinsic(prefer_literal=True)
def transpose_block(typing, size, X, xs, out, outs):  # type: ignore[no-untyped-def]
    """Transpose the square of so many bytes: row k begins in ``X`` at ``xs[k]``, and in ``out`` at ``outs[k]``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds = signature.args[1:]
        X, xs, out, outs = _pointers(context, builder, kinds, arguments[1:])
        vectors = _Vectors(context, builder, kinds[0].dtype, size.literal_value)
        width = vectors.width

        def starts(pointer: Any) -> list[Any]:
            return [builder.load(builder.gep(pointer, [ir.IntType(64)(k)])) for k in range(width)]

        rows = [vectors.load(X, start) for start in starts(xs)]
        for _ in range(width.bit_length() - 1):  # each turn moves one bit of the row's number to the column's
            pairs = zip(rows[: width // 2], rows[width // 2 :], strict=True)
            rows = [row for pair in pairs for row in vectors.interleaved(*pair)]
        for row, start in zip(rows, starts(outs), strict=True):
            vectors.store(row, out, start)
        return context.get_dummy_value()

    return types.void(size, X, xs, out, outs), generate


@intrinsic(prefer_literal=True)
def add_product(  # type: ignore[no-untyped-def]
    typing, height, size, count, depth, a, a_start, a_row, a_step, b, b_start, b_step, c, c_start, c_row
):
    """Add the product of two matrices to a third, ``c[i] += sum_k a[i, k] b[k]``, so many rows at a time.

    A row of ``c``, ``i in range(count)``, is the ``size`` bytes that begin at ``c_start + i * c_row``; one of ``b``,
    ``k in range(depth)``, those that begin at ``b_start + k * b_step``; and ``a[i, k]`` is at
    ``a_start + i * a_row + k * a_step``. The registers hold ``height`` rows of ``c`` beside one of ``b``.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds = [signature.args[k] for k in (4, 8, 11)]
        a, b, c = _pointers(context, builder, kinds, [arguments[k] for k in (4, 8, 11)])
        _, _, count, depth, _, a_start, a_row, a_step, _, b_start, b_step, _, c_start, c_row = arguments
        vectors, index = _Vectors(context, builder, kinds[0].dtype, signature.args[1].literal_value), count.type
        most = signature.args[0].literal_value

        def at(start: Any, number: Any, stride: Any) -> Any:
            return builder.add(start, builder.mul(number, stride))

        def tile(first: Any, height: int) -> None:
            rows = [builder.add(first, index(h)) for h in range(height)]
            places = [at(c_start, row, c_row) for row in rows]
            factors = [builder.gep(a, [at(a_start, row, a_row)]) for row in rows]
            totals = [cgutils.alloca_once_value(builder, vectors.load(c, place)) for place in places]  # type: ignore[no-untyped-call]
            with cgutils.for_range(builder, depth, intp=index) as loop:  # type: ignore[no-untyped-call]
                row, step = vectors.load(b, at(b_start, loop.index, b_step)), builder.mul(loop.index, a_step)
                for total, factor in zip(totals, factors, strict=True):
                    value = vectors.filled(builder.load(builder.gep(factor, [step])))
                    builder.store(vectors.add(builder.load(total), vectors.multiply(value, row)), total)
            for total, place in zip(totals, places, strict=True):
                vectors.store(builder.load(total), c, place)

        whole = builder.sub(count, builder.srem(count, index(most)))
        for first, last, height in ((index(0), whole, most), (whole, count, 1)):
            with cgutils.for_range_slice(builder, first, last, index(height), index) as (i, _):
                tile(i, height)
        return context.get_dummy_value()

    n = types.intp
    return types.void(height, size, n, n, a, n, n, n, b, n, n, c, n, n), generate


class _Vectors:
    """Code for vectors of this many bytes, a power of 2, with elements of this type of numba's."""

    def __init__(self, context: Any, builder: Any, dtype: Any, size: int) -> None:
        self.builder, self.element = builder, context.get_value_type(dtype)
        self._aligned = context.get_abi_sizeof(self.element)
        self.width = size // self._aligned
        self.vector = ir.VectorType(self.element, self.width)

    def load(self, pointer: Any, start: Any) -> Any:
        return self.builder.load(self._at(pointer, start), align=self._aligned)

    def store(self, vector: Any, pointer: Any, start: Any) -> None:
        self.builder.store(vector, self._at(pointer, start), align=self._aligned)

    def filled(self, scalar: Any) -> Any:
        none = ir.Constant(self.vector, ir.Undefined)
        return self._picked(self.builder.insert_element(none, scalar, ir.IntType(32)(0)), none, [0] * self.width)

    def interleaved(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return the elements of both in turn: those of the first halves, and of the second."""
        order = [x for k in range(self.width) for x in (k, self.width + k)]
        return self._picked(a, b, order[: self.width]), self._picked(a, b, order[self.width :])

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=REORDERED)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=REORDERED)

    def sum(self, vector: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self.width}{self.element.intrinsic_name}"
        kind = ir.FunctionType(self.element, [self.element, self.vector])
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)  # type: ignore[no-untyped-call]
        return self.builder.call(reduce, [self.element(-0.0), vector], fastmath=REORDERED)

    def _picked(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self.width), order))

    def _at(self, pointer: Any, start: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [start]), self.vector.as_pointer())


class _Row(_Vectors):
    """The code of ``add_row``; arrays are contiguous, and vectors are of their elements.

    Attributes:
        a: pointer to the first element of that array.
        b: the same.
        ys: where the pieces of ``y`` begin.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        _, size, _, _, col, _, a, X, b, starts, _, _ = signature.args
        _, _, self._first, self._last, *arrays, xs, ys, start = arguments
        self._scale = arrays.pop(1)
        super().__init__(context, builder, X.dtype, size.literal_value)
        self._col, self.a, self._X, self.b = _pointers(context, builder, (col, a, X, b), arrays)
        self._xs = [builder.extract_value(xs, k) for k in range(starts.count)]
        self.ys = [builder.add(builder.extract_value(ys, k), start) for k in range(starts.count)]

    @contextmanager
    def nonzeros(self) -> Iterator[tuple[Any, list[Any]]]:
        """Loop over the nonzeros: the code in the ``with`` gets a number, and the pieces that it is multiplied with."""
        builder, index = self.builder, self._first.type
        pieces = [builder.gep(self._X, [start]) for start in self._xs]
        with cgutils.for_range_slice(builder, self._first, self._last, index(1), index) as (p, _):
            start = builder.mul(builder.sext(builder.load(builder.gep(self._col, [p])), index), self._scale)
            yield p, [self.load(piece, start) for piece in pieces]


def _pointers(context: Any, builder: Any, kinds: Any, arrays: Any) -> Iterator[Any]:
    """Return pointers to the first elements of arrays."""
    return (context.make_array(kind)(context, builder, x).data for kind, x in zip(kinds, arrays, strict=True))
