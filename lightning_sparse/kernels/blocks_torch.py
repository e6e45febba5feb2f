"""Products with a matrix of blocks by torch: one row of blocks after the other, each a dense matrix."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sparse.kernels.structure import Structure

if TYPE_CHECKING:
    from lightning_sparse.kernels import blocks_torch as this
    from lightning_sparse.kernels.blocks import BlockProducts

    checked: BlockProducts = this

__all__ = ["gradient", "matmul", "matmul_transposed"]


def matmul(x: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """Return ``x W.T``, ``(n, out)``.

    Args:
        x: ``(n, in)``.
        values: the nonzeros of the weight ``(out, in)`` in the order of their positions, of the dtype of ``x``.
        weight: where its blocks are.
    """
    rows, _ = weight.block
    y = x.new_zeros(len(x), weight.matrix.shape[0] * rows)
    for outputs, columns, nonzeros in _rows(weight):
        y[:, outputs] = _gathered(x, columns, weight) @ values[nonzeros].view(rows, -1).t()
    return y


def matmul_transposed(delta: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """Return ``delta W``, ``(n, in)``; ``delta`` is ``(n, out)``, and the other arguments are as in ``matmul``."""
    rows, width = weight.block
    dx = delta.new_zeros(len(delta), weight.matrix.shape[1], width)
    for outputs, columns, nonzeros in _rows(weight):
        part = delta[:, outputs] @ values[nonzeros].view(rows, -1)
        dx.index_add_(1, columns, part.view(len(delta), -1, width))
    return dx.flatten(1)


def gradient(delta: Tensor, x: Tensor, weight: Structure) -> Tensor:
    """Return ``delta.T x`` where the weight has its blocks, ``(nnz,)``, in the order of positions.

    Args:
        delta: ``(n, out)``.
        x: ``(n, in)``.
        weight: where the blocks are.
    """
    rows, width = weight.block
    dvalues = x.new_empty(len(weight.matrix.col) * rows * width)
    for outputs, columns, nonzeros in _rows(weight):
        dvalues[nonzeros] = (delta[:, outputs].t() @ _gathered(x, columns, weight)).view(-1)
    return dvalues


def _rows(weight: Structure) -> Iterator[tuple[slice, Tensor, slice]]:
    """Yield of each row of blocks its outputs, the columns of its blocks, and its nonzeros, which are not none."""
    (rows, width), crow = weight.block, weight.matrix.crow.tolist()
    for row, (first, last) in enumerate(pairwise(crow)):
        if first < last:
            nonzeros = slice(first * rows * width, last * rows * width)
            yield slice(row * rows, (row + 1) * rows), weight.matrix.col[first:last], nonzeros


def _gathered(x: Tensor, columns: Tensor, weight: Structure) -> Tensor:
    """Return the features that some blocks read, ``(n, blocks C)``."""
    return torch.unflatten(x, 1, (-1, weight.block[1])).index_select(1, columns).flatten(1)
