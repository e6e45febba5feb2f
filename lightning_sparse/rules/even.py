"""Even: some of many that follow each other, spread evenly."""

import math

import torch
from torch import Tensor

__all__ = ["evenly", "fractions"]


def evenly(n: int, k: int) -> Tensor:
    """Return ``k`` of the numbers below ``n``, ascending: spread evenly, over any rows that they are laid out in.

    Those whose multiple of the golden ratio has the smallest fraction.

    >>> evenly(12, 4)
    tensor([ 0,  2,  5, 10])
    """
    return fractions(torch.arange(n)).argsort()[:k].sort().values


def fractions(numbers: Tensor) -> Tensor:
    """Return the fractions of multiples of the golden ratio."""
    return (numbers.double() * ((math.sqrt(5) - 1) / 2)).frac()
