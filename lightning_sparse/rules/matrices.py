"""Weights as matrices: what each output reads is a row."""

import torch
from torch import Tensor

__all__ = ["as_matrix", "write_matrix"]


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
