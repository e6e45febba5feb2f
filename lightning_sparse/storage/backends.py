"""Which code multiplies: ``torch_backend`` anywhere, ``numba_backend`` on CPU if the extra ``fast`` is installed.

``LIGHTNING_SPARSE_KERNELS=torch`` (or ``numba``) forces one of them, as for the other kernels.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lightning_sparse import kernels
from lightning_sparse.storage import torch_backend
from lightning_sparse.storage.structure import CSR

__all__ = ["backend", "matmul", "sampled"]


def backend(x: Tensor) -> ModuleType:
    """Return the module of products that suits a tensor best."""
    compiled = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and kernels._numba() is not None
    return importlib.import_module("lightning_sparse.storage.numba_backend") if compiled else torch_backend


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """Return the CSR matrix times ``X``; see ``torch_backend.matmul``."""
    if not X.numel() or not len(values):
        return X.new_zeros(csr.shape[0], X.shape[1])
    product: Tensor = backend(X).matmul(csr, values, X)
    return product


def sampled(csr: CSR, G: Tensor, X: Tensor) -> Tensor:
    """Return ``G @ X.T`` where the CSR matrix has its nonzeros; see ``torch_backend.sampled``."""
    if not X.numel() or not len(csr.col):
        return X.new_zeros(len(csr.col))
    gradient: Tensor = backend(X).sampled(csr, G, X)
    return gradient
