"""Products with a matrix of blocks by Triton, on tensor cores: the functions of ``blocks_torch`` on CUDA.

In bfloat16 and float16 sums are in float32; in float32 products are TF32 where torch's own are. A program multiplies
some rows of the input with one row or one column of blocks, or makes the gradient of one block. Blocks have sides that
are powers of 2 from 16 on, the least that tensor cores take; others are left to ``blocks_torch``.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sparse.compat.lightning import rank_zero_warn
from lightning_sparse.kernels import blocks_torch
from lightning_sparse.kernels.structure import CSR, Structure
from lightning_sparse.kernels.triton_compiler import INTERPRETED, kernel, launch

if TYPE_CHECKING:
    from lightning_sparse.kernels import blocks_triton as this
    from lightning_sparse.kernels.blocks import BlockProducts

    checked: BlockProducts = this

__all__ = ["gradient", "matmul", "matmul_transposed"]

_SIDES = 16, 32, 64, 128
_BATCH = 128  # rows of the input that a program takes at once


def matmul(x: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.matmul``."""
    if not _suits(weight):
        return blocks_torch.matmul(x, values, weight)
    (crow, col, (down, _)), (R, _) = weight.matrix, weight.block
    y = x.new_empty(len(x), down * R)
    batch = _rows(len(x))
    programs = triton.cdiv(len(x), batch), down
    _start(_matmul, programs, weight, x.contiguous(), values, y, crow, col, len(x), x.shape[1], y.shape[1], BATCH=batch)
    return y


def matmul_transposed(delta: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.matmul_transposed``."""
    if not _suits(weight):
        return blocks_torch.matmul_transposed(delta, values, weight)
    (crow, col, (across, _)), (_, C) = weight.transposed, weight.block
    dx = delta.new_empty(len(delta), across * C)
    batch = _rows(len(delta))
    where = crow, col, weight.permutation, weight.matrix.crow
    sizes = len(delta), delta.shape[1], dx.shape[1]
    programs = triton.cdiv(len(delta), batch), across
    _start(_matmul_transposed, programs, weight, delta.contiguous(), values, dx, *where, *sizes, BATCH=batch)
    return dx


def gradient(delta: Tensor, x: Tensor, weight: Structure) -> Tensor:
    """As ``blocks_torch.gradient``."""
    if not _suits(weight):
        return blocks_torch.gradient(delta, x, weight)
    (crow, col, (down, _)), (R, C) = weight.matrix, weight.block
    dvalues = x.new_empty(len(col) * R * C)
    rows = torch.arange(down, device=col.device).repeat_interleave(crow.diff(), output_size=len(col))
    sizes = len(x), delta.shape[1], x.shape[1]
    where = rows, crow, col
    _start(
        _gradient, len(col), weight, delta.contiguous(), x.contiguous(), dvalues, *where, *sizes, BATCH=_rows(len(x))
    )
    return dvalues


def _suits(weight: Structure) -> bool:
    return all(side in _SIDES for side in weight.block)


def _rows(n: int) -> int:
    """Return how many rows of the input a program takes at once."""
    return min(_BATCH, max(_SIDES[0], int(triton.next_power_of_2(n))))


def _start(function: Any, programs: int | tuple[int, int], weight: Structure, *arguments: Any, BATCH: int) -> None:
    R, C = weight.block
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    launch(function, programs, *arguments, R=R, C=C, BATCH=BATCH, PRECISION=precision)


@kernel
def _matmul(  # type: ignore[no-untyped-def]
    x, values, y, crow, col, n, inputs, outputs,
    R: tl.constexpr, C: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    row = (tl.program_id(0) * BATCH + tl.arange(0, BATCH)).to(tl.int64)[:, None]
    r, c = tl.arange(0, R)[None, :], tl.arange(0, C)
    first, last = tl.load(crow + i), tl.load(crow + i + 1)
    wide, start = (last - first) * C, values + first.to(tl.int64) * R * C
    total = tl.full((BATCH, R), 0, tl.float32)
    for j in range(first, last):
        part = tl.load(x + row * inputs + tl.load(col + j) * C + c[None, :], row < n, 0)
        transposed = tl.load(start + (j - first) * C + r * wide + c[:, None])
        total = tl.dot(part, transposed, total, input_precision=PRECISION)
    tl.store(y + row * outputs + i * R + r, total.to(y.dtype.element_ty), row < n)


@kernel
def _matmul_transposed(  # type: ignore[no-untyped-def]
    delta, values, dx, crow, col, permutation, starts, n, outputs, inputs,
    R: tl.constexpr, C: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(1)
    row = (tl.program_id(0) * BATCH + tl.arange(0, BATCH)).to(tl.int64)[:, None]
    r, c = tl.arange(0, R), tl.arange(0, C)[None, :]
    total = tl.full((BATCH, C), 0, tl.float32)
    for p in range(tl.load(crow + j), tl.load(crow + j + 1)):
        i = tl.load(col + p)
        first, last = tl.load(starts + i), tl.load(starts + i + 1)
        start = values + first.to(tl.int64) * R * C + (tl.load(permutation + p) - first) * C
        part = tl.load(delta + row * outputs + i * R + r[None, :], row < n, 0)
        block = tl.load(start + r[:, None] * (last - first) * C + c)
        total = tl.dot(part, block, total, input_precision=PRECISION)
    tl.store(dx + row * inputs + j * C + c, total.to(dx.dtype.element_ty), row < n)


@kernel
def _gradient(  # type: ignore[no-untyped-def]
    delta, x, dvalues, rows, crow, col, n, outputs, inputs,
    R: tl.constexpr, C: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    i, j = tl.load(rows + b), tl.load(col + b)
    first, last = tl.load(crow + i), tl.load(crow + i + 1)
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    total = tl.full((R, C), 0, tl.float32)
    for low in range(0, n, BATCH):
        row = (low + tl.arange(0, BATCH)).to(tl.int64)
        part = tl.load(x + row[:, None] * inputs + j * C + c, row[:, None] < n, 0)
        transposed = tl.load(delta + row[None, :] * outputs + i * R + r, row[None, :] < n, 0)
        total = tl.dot(transposed, part, total, input_precision=PRECISION)
    start = dvalues + first.to(tl.int64) * R * C + (b - first) * C
    tl.store(start + r * (last - first) * C + c, total.to(dvalues.dtype.element_ty))


def _check() -> None:
    """Raise ImportError, for torch to compute, and warn, if Triton does not run here.

    No C compiler, a GPU that it does not know: whatever it is.
    """
    try:
        crow, col = torch.arange(2, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        one = CSR(crow, col, (1, 1))
        ones = torch.ones(1, 16, device="cuda"), torch.ones(256, device="cuda")
        matmul(*ones, Structure(one, one, col, block=(16, 16)))
    except Exception as error:
        rank_zero_warn(
            f"Layers of blocks are slow: Triton does not run here ({type(error).__name__}: {error}). "
            "Install triton, and a C compiler, which it needs."
        )
        raise ImportError(f"Triton does not run here: {error}") from error


if not INTERPRETED:
    _check()
