"""Where nonzeros are, in about one byte each: how many zeros lie before every one of them.

A byte below 255 stands for that many zeros and the nonzero behind them. The byte 255 stands for 255 zeros and no
nonzero, so longer gaps take several bytes.
"""

import torch
from torch import Tensor

__all__ = ["gap_bytes", "gaps", "gaps_to_positions"]

_LONG = 255


def gaps(positions: Tensor) -> Tensor:
    """Return the bytes, uint8, that stand for ascending flat ``positions``, int64.

    >>> gaps(torch.tensor([0, 3, 303]))
    tensor([  0,   2, 255,  44], dtype=torch.uint8)
    """
    zeros = _zeros(positions)
    ends = (zeros // _LONG + 1).cumsum(0)
    coded = torch.full((int(ends[-1]) if len(ends) else 0,), _LONG, dtype=torch.uint8, device=positions.device)
    coded[ends - 1] = (zeros % _LONG).to(torch.uint8)
    return coded


def gap_bytes(positions: Tensor) -> int:
    """Return how many bytes ``gaps(positions)`` takes.

    >>> gap_bytes(torch.tensor([0, 3, 303]))
    4
    """
    return len(positions) + int((_zeros(positions) // _LONG).sum())


def gaps_to_positions(coded: Tensor, size: int) -> Tensor:
    """Return the flat positions, ascending, int64, that ``gaps`` has written for a tensor of ``size`` elements.

    Raises:
        ValueError: they are no bytes, or lead out of the tensor.

    >>> gaps_to_positions(torch.tensor([0, 2, 255, 44], dtype=torch.uint8), 400)
    tensor([  0,   3, 303])
    """
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError(f"gaps must be a vector of bytes, got shape {tuple(coded.shape)} and {coded.dtype}.")
    nonzero = coded != _LONG
    reached = (coded + nonzero).cumsum(0, dtype=torch.int64)  # a nonzero takes a place itself; 254 + 1 fits a byte
    if len(reached) and int(reached[-1]) > size:
        raise ValueError(f"gaps must end within a tensor of {size} elements, got {int(reached[-1])}.")
    return reached[nonzero] - 1


def _zeros(positions: Tensor) -> Tensor:
    """Return how many zeros lie between each position and the one before it."""
    return torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
