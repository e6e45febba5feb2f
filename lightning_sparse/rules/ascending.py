"""Ascending vectors of positions as sets: what is in them, and two as one, in time that goes with their lengths."""

import torch
from torch import Tensor

from lightning_sparse.kernels import positions
from lightning_sparse.kernels.positions import ranks

__all__ = ["contains", "different", "merged"]


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return two ascending vectors without common elements as one, ascending.

    >>> merged(torch.tensor([1, 4, 6]), torch.tensor([0, 5]))
    tensor([0, 1, 4, 5, 6])
    """
    return positions.merged(b, a) if len(b) > len(a) else positions.merged(a, b)


def contains(ascending: Tensor, x: Tensor) -> Tensor:
    """Tell which elements of ``x`` are among those of a vector; both are ascending.

    >>> contains(torch.tensor([1, 4, 6]), torch.tensor([0, 4, 7]))
    tensor([False,  True, False])
    """
    if not len(ascending):
        return torch.zeros_like(x, dtype=torch.bool)
    return ascending[ranks(ascending, x).clamp_(max=len(ascending) - 1)] == x


def different(x: Tensor) -> Tensor:
    """Return what there is in a vector, ascending, once each; ``x``, on the CPU, is overwritten.

    >>> different(torch.tensor([3, 1, 3]))
    tensor([1, 3])
    """
    values = x.numpy()
    values.sort()  # in place: torch's takes several times the memory
    new = torch.ones(len(x), dtype=torch.bool)
    torch.ne(x[1:], x[:-1], out=new[1:])
    return torch.from_numpy(values[new.numpy()])
