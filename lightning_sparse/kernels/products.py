"""Products with a CSR matrix, by torch on any device, or by compiled code where that is installed.

A fit measures which is quicker and tells the layers; without, it is the first of the candidates.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.dispatch import DENSE
from lightning_sparse.kernels.structure import CSR

__all__ = ["DENSE", "Products", "backend", "candidates", "matmul", "sampled", "transposed"]


class Products(Protocol):
    """What sparse layers compute: the functions of ``products_torch``, where they are described."""

    def matmul(self, csr: CSR, values: Tensor, X: Tensor) -> Tensor:
        """Return the matrix times ``X``."""

    def sampled(self, csr: CSR, G: Tensor, X: Tensor) -> Tensor:
        """Return ``G @ X.T`` where the matrix has its nonzeros."""

    def transposed(self, X: Tensor) -> Tensor:
        """Return the transpose of a matrix, contiguous."""


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of the backends there are for tensors like this; the first is the quicker one as a rule."""
    return list(dispatch.candidates("products", device, dtype))


def backend(x: Tensor, name: str | None = None) -> Products:
    """Return the products of the backend of this name, or of the first of the candidates if it is none of them.

    Raises:
        ValueError: there is no backend of this name anywhere.
    """
    products: Products = dispatch.chosen("products", x.device, x.dtype, name)
    return products


def matmul(csr: CSR, values: Tensor, X: Tensor, name: str | None = None) -> Tensor:
    """Return the CSR matrix times ``X`` with the backend of this name; see ``products_torch.matmul``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    _check(csr.shape[1] == len(X), csr, X)
    if not X.numel() or not len(values):
        return X.new_zeros(csr.shape[0], X.shape[1])
    return backend(X, name).matmul(csr, values, X)


def sampled(csr: CSR, G: Tensor, X: Tensor, name: str | None = None) -> Tensor:
    """Return ``G @ X.T`` where the CSR matrix has its nonzeros; see ``products_torch.sampled``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    _check(csr.shape == (len(G), len(X)) and G.shape[1] == X.shape[1], csr, G, X)
    if not X.numel() or not len(csr.col):
        return X.new_zeros(len(csr.col))
    return backend(X, name).sampled(csr, G, X)


def transposed(X: Tensor, name: str | None = None) -> Tensor:
    """Return the transpose of a matrix, contiguous, with the backend of this name."""
    return backend(X, name).transposed(X)


def _check(fit: bool, csr: CSR, *others: Tensor) -> None:
    """Raise if shapes do not fit: compiled loops would read what is not theirs."""
    if not fit:
        shapes = " and ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(
            f"A sparse weight of shape {tuple(csr.shape)} cannot be multiplied with {shapes}: give it inputs of "
            f"{csr.shape[1]} features, in a convolution those of all channels and places of the kernel."
        )
