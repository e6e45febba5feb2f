"""Powerpropagation: ``v`` is trained, and ``W = v |v|^(p-1)`` computes (Schwarz et al., NeurIPS 2021)."""

from torch import Tensor

__all__ = ["power_", "root", "times_derivative_"]


def power_(v: Tensor, power: float) -> Tensor:
    """Replace ``v`` by ``v |v|^(p-1)``.

    >>> import torch
    >>> power_(torch.tensor([-3.0, 2.0]), 2.0)
    tensor([-9.,  4.])
    """
    return v if power == 1 else v.mul_(v.abs().pow_(power - 1))


def root(W: Tensor, power: float) -> Tensor:
    """Return the ``v`` of ``W``, ``sign(W) |W|^(1/p)``.

    >>> import torch
    >>> root(torch.tensor([-9.0, 4.0]), 2.0)
    tensor([-3.,  2.])
    """
    return W if power == 1 else W.sign() * W.abs().pow(1 / power)


def times_derivative_(gradient: Tensor, v: Tensor, power: float) -> Tensor:
    """Multiply a gradient by ``dW / dv = p |v|^(p-1)``."""
    return gradient if power == 1 else gradient.mul_(v.abs().pow_(power - 1).mul_(power))
