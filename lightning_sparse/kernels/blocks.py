"""Products with a matrix of blocks, by torch on any device, or by compiled code where that is installed.

Inputs and outputs are as layers have them, ``(n, features)``: a block reads C neighbouring features of each.
"""

from typing import Protocol

from torch import Tensor

from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.structure import Structure

__all__ = ["BlockProducts", "gradient", "matmul", "matmul_transposed"]


class BlockProducts(Protocol):
    """What layers of blocks compute: the functions of ``blocks_torch``, where they are described."""

    def matmul(self, x: Tensor, values: Tensor, weight: Structure) -> Tensor:
        """Return ``x W.T``."""

    def matmul_transposed(self, delta: Tensor, values: Tensor, weight: Structure) -> Tensor:
        """Return ``delta W``."""

    def gradient(self, delta: Tensor, x: Tensor, weight: Structure) -> Tensor:
        """Return ``delta.T x`` where the weight has its blocks."""


def matmul(x: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """Return ``x W.T``; see ``blocks_torch.matmul``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    out, inputs = _shape(weight)
    _check(x.shape[1] == inputs, weight, x)
    if not x.numel() or not len(values):
        return x.new_zeros(len(x), out)
    return _products(x, weight).matmul(x, values, weight)


def matmul_transposed(delta: Tensor, values: Tensor, weight: Structure) -> Tensor:
    """Return ``delta W``; see ``blocks_torch.matmul_transposed``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    out, inputs = _shape(weight)
    _check(delta.shape[1] == out, weight, delta)
    if not delta.numel() or not len(values):
        return delta.new_zeros(len(delta), inputs)
    return _products(delta, weight).matmul_transposed(delta, values, weight)


def gradient(delta: Tensor, x: Tensor, weight: Structure) -> Tensor:
    """Return ``delta.T x`` where the weight has its blocks; see ``blocks_torch.gradient``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    _check((delta.shape[1], x.shape[1]) == _shape(weight) and len(delta) == len(x), weight, delta, x)
    nnz = len(weight.matrix.col) * weight.block[0] * weight.block[1]
    if not x.numel() or not nnz:
        return x.new_zeros(nnz)
    return _products(x, weight).gradient(delta, x, weight)


def _products(x: Tensor, weight: Structure) -> BlockProducts:
    found: BlockProducts = dispatch.chosen("blocks", x.device, x.dtype, weight.backend)
    return found


def _shape(weight: Structure) -> tuple[int, int]:
    """Return outputs and inputs."""
    (rows, columns), (down, across) = weight.block, weight.matrix.shape
    return down * rows, across * columns


def _check(fit: bool, weight: Structure, *others: Tensor) -> None:
    """Raise if shapes do not fit: compiled loops would read what is not theirs."""
    if not fit:
        shapes = " and ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(
            f"A weight of blocks of shape {_shape(weight)} cannot be multiplied with {shapes}: give it inputs of "
            f"{_shape(weight)[1]} features."
        )
