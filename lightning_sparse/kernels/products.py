"""Which code multiplies: ``torch_products`` anywhere, ``numba_products`` on CPU if the extra ``fast`` is installed.

A fit measures which is quicker and tells the layers; without, it is numba. ``LIGHTNING_SPARSE_KERNELS=torch`` (or
``numba``) forces one of them, as for the other kernels.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lightning_sparse import kernels
from lightning_sparse.kernels.structure import CSR

__all__ = ["backend", "candidates", "matmul", "sampled", "transposed"]


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of the backends there are for tensors like this; the first is the quicker one as a rule."""
    compiled = device.type == "cpu" and dtype in (torch.float32, torch.float64) and kernels._numba() is not None
    if not compiled:
        return ["torch"]
    return ["numba"] if kernels._wanted() == "numba" else ["numba", "torch"]


def backend(x: Tensor, name: str | None = None) -> ModuleType:
    """Return the module of products of this name, or the first of the candidates if it is none of them."""
    names = candidates(x.device, x.dtype)
    return importlib.import_module(f"lightning_sparse.kernels.{name if name in names else names[0]}_products")


def matmul(csr: CSR, values: Tensor, X: Tensor, name: str | None = None) -> Tensor:
    """Return the CSR matrix times ``X`` with the backend of this name; see ``torch_products.matmul``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    _check(csr.shape[1] == len(X), csr, X)
    if not X.numel() or not len(values):
        return X.new_zeros(csr.shape[0], X.shape[1])
    product: Tensor = backend(X, name).matmul(csr, values, X)
    return product


def sampled(csr: CSR, G: Tensor, X: Tensor, name: str | None = None) -> Tensor:
    """Return ``G @ X.T`` where the CSR matrix has its nonzeros; see ``torch_products.sampled``.

    Raises:
        RuntimeError: the shapes do not fit.
    """
    _check(csr.shape == (len(G), len(X)) and G.shape[1] == X.shape[1], csr, G, X)
    if not X.numel() or not len(csr.col):
        return X.new_zeros(len(csr.col))
    gradient: Tensor = backend(X, name).sampled(csr, G, X)
    return gradient


def transposed(X: Tensor, name: str | None = None) -> Tensor:
    """Return the transpose of a matrix, contiguous, with the backend of this name."""
    turned: Tensor = backend(X, name).transposed(X)
    return turned


def _check(fit: bool, csr: CSR, *others: Tensor) -> None:
    """Raise if shapes do not fit: compiled loops would read what is not theirs."""
    if not fit:
        shapes = " and ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(
            f"A sparse weight of shape {tuple(csr.shape)} cannot be multiplied with {shapes}: give it inputs of "
            f"{csr.shape[1]} features, in a convolution those of all channels and places of the kernel."
        )
