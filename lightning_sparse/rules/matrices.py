"""Weights as matrices: what each output reads is a row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_matrix", "row_sums", "rows_of", "write_matrix"]


def as_matrix(x: Tensor, transposed_groups: int = 0) -> Tensor:
    """Return ``x``, a weight or one of its like, as a matrix ``(out, n)``: a view wherever its layout allows.

    ``n`` runs over what one output neuron or filter reads, in the order of memory: two tensors pair up if their
    strides are equal.
    """
    if transposed_groups:
        inputs, per_group = x.shape[:2]
        grouped = x.reshape(transposed_groups, inputs // transposed_groups, per_group, -1)
        return grouped.transpose(1, 2).reshape(transposed_groups * per_group, -1)
    if x.ndim == 2:
        return x
    for layout in (torch.channels_last, torch.channels_last_3d):
        if x.ndim == (4 if layout is torch.channels_last else 5) and x.is_contiguous(memory_format=layout):
            return x.movedim(1, -1).reshape(len(x), -1)
    return x.reshape(len(x), -1)


def write_matrix(x: Tensor, matrix: Tensor, transposed_groups: int = 0) -> None:
    """Bring ``matrix``, got from ``as_matrix(x)``, back into ``x``, unless it is a view of it."""
    if matrix.data_ptr() == x.data_ptr():
        return
    if transposed_groups:
        inputs, per_group = x.shape[:2]
        grouped = matrix.reshape(transposed_groups, per_group, inputs // transposed_groups, -1)
        matrix = grouped.transpose(1, 2)
    x.copy_(matrix.reshape(x.shape))


def rows_of(positions: Tensor, shape: Sequence[int], transposed_groups: int = 0) -> Tensor:
    """Return the row of ``as_matrix`` that each flat position of a weight of ``shape`` is in.

    >>> rows_of(torch.tensor([0, 3, 5]), (2, 3))
    tensor([0, 1, 1])
    """
    if not transposed_groups:
        return positions.div(math.prod(shape[1:]), rounding_mode="floor")
    inputs, per_group, kernel = shape[0], shape[1], math.prod(shape[2:])
    group = positions.div(inputs // transposed_groups * per_group * kernel, rounding_mode="floor")
    return group * per_group + positions.div(kernel, rounding_mode="floor") % per_group


def row_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of rows that stand one after the other, of these lengths, in at least float32.

    >>> row_sums(torch.tensor([1.0, 2.0, 8.0]), torch.tensor([2, 0, 1]))
    tensor([3., 0., 8.])
    """
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.segment_reduce(exact, "sum", lengths=lengths)  # in the same order on all processes, also of GPUs
