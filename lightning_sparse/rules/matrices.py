"""Weights as matrices: what each output reads is a row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FIRST", "Outputs", "as_matrix", "outputs_first", "parts", "row_sums", "rows_of", "write_matrix"]


class Outputs(NamedTuple):
    """Where a layer's outputs lie in its weight.

    Attributes:
        axis: the dimension along which they lie.
        groups: the first dimension has so many parts with outputs of their own: the groups of a transposed
            convolution, or the matrices of a stack; 1 where outputs lie along the first dimension alone.
        stacked: the first dimension counts matrices, such as experts.

    >>> Outputs(axis=1).rows((3, 5)), Outputs(axis=1, groups=4, stacked=True).rows((4, 5, 3))
    (5, 20)
    """

    axis: int = 0
    groups: int = 1
    stacked: bool = False

    def rows(self, shape: Sequence[int]) -> int:
        """Return the number of outputs of a weight of this ``shape``."""
        return self.groups * shape[self.axis]

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Outputs":
        """Return those of a weight in a checkpoint; earlier versions knew transposed convolutions alone."""
        if "outputs" in state:
            return cls(**state["outputs"])
        groups = state["transposed_groups"]
        return cls(1, groups) if groups else FIRST


#: of most layers
FIRST = Outputs()


def as_matrix(x: Tensor, outputs: Outputs = FIRST) -> Tensor:
    """Return ``x``, a weight or one of its like, as a matrix ``(out, n)``: a view wherever its layout allows.

    ``n`` runs over what one output neuron or filter reads, in the order of memory: two tensors pair up if their
    strides are equal.
    """
    if outputs is not FIRST and outputs != FIRST:
        rows = outputs.rows(x.shape)
        return parts(x, outputs).reshape(rows, x.numel() // max(rows, 1))  # a process may have no element
    if x.ndim == 2:
        return x
    for layout in (torch.channels_last, torch.channels_last_3d):
        if x.ndim == (4 if layout is torch.channels_last else 5) and x.is_contiguous(memory_format=layout):
            return x.movedim(1, -1).reshape(len(x), math.prod(x.shape[1:]))
    return x.reshape(len(x), math.prod(x.shape[1:]))


def write_matrix(x: Tensor, matrix: Tensor, outputs: Outputs = FIRST) -> None:
    """Bring ``matrix``, got from ``as_matrix(x)``, back into ``x``, unless it is a view of it."""
    if matrix.data_ptr() == x.data_ptr():
        return
    like = x if outputs == FIRST else parts(x, outputs)
    like.copy_(matrix.reshape(like.shape))


def outputs_first(x: Tensor, outputs: Outputs) -> Tensor:
    """Return ``x`` with its dimensions in the order of a plain layer, ``(out, in / groups, ...)``.

    >>> outputs_first(torch.tensor([[1, 2, 3], [4, 5, 6]]), Outputs(axis=1))
    tensor([[1, 4],
            [2, 5],
            [3, 6]])
    """
    return x if outputs == FIRST else parts(x, outputs).flatten(0, 1)


def parts(x: Tensor, outputs: Outputs) -> Tensor:
    """Return ``x``, a weight or one of its like, as a view ``(groups, out / groups, in / groups, ...)``."""
    if outputs.stacked:
        return x.movedim(outputs.axis, 1)
    parts: Tensor = torch.unflatten(x, 0, (outputs.groups, -1))
    return parts.movedim(outputs.axis + 1, 1)


def rows_of(positions: Tensor, shape: Sequence[int], outputs: Outputs = FIRST) -> Tensor:
    """Return the row of ``as_matrix`` that each flat position of a weight of ``shape`` is in.

    >>> rows_of(torch.tensor([0, 3, 5]), (2, 3))
    tensor([0, 1, 1])
    """
    axis, groups, _ = outputs
    row = positions.div(math.prod(shape[axis + 1 :]), rounding_mode="floor")
    if outputs == FIRST:
        return row
    group = positions.div(math.prod(shape) // groups, rounding_mode="floor")
    return group * shape[axis] + row % shape[axis]


def row_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of rows that stand one after the other, of these lengths, in at least float32.

    >>> row_sums(torch.tensor([1.0, 2.0, 8.0]), torch.tensor([2, 0, 1]))
    tensor([3., 0., 8.])
    """
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.segment_reduce(exact, "sum", lengths=lengths)  # in the same order on all processes, also of GPUs
