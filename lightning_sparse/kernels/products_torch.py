"""Products with a CSR matrix by ``torch.sparse``, on any device; all index tensors stay int32."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sparse.kernels.structure import CSR

if TYPE_CHECKING:
    from lightning_sparse.kernels import products_torch as this
    from lightning_sparse.kernels.products import Products

    checked: Products = this

__all__ = ["matmul", "sampled", "transposed"]

with warnings.catch_warnings():  # torch says once that sparse CSR is beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


def matmul(csr: CSR, values: Tensor, X: Tensor) -> Tensor:
    """Return the matrix times ``X``, ``(rows, n)``.

    Args:
        csr: where the nonzeros are.
        values: the nonzeros, ``(nnz,)``, of the dtype of ``X``.
        X: ``(columns, n)``, contiguous.
    """
    return torch.mm(_tensor(csr, values), X)


def sampled(csr: CSR, G: Tensor, X: Tensor) -> Tensor:
    """Return the elements of ``G @ X.T`` where the matrix has its nonzeros, ``(nnz,)``.

    Args:
        csr: where the nonzeros are.
        G: ``(rows, n)``, contiguous.
        X: ``(columns, n)``, contiguous.
    """
    out = _tensor(csr, torch.zeros(len(csr.col), dtype=X.dtype, device=X.device))
    torch.sparse.sampled_addmm(out, G, X.t(), beta=0.0, out=out)  # a fresh result would have int64 indices
    return out.values()


def transposed(X: Tensor) -> Tensor:
    """Return the transpose of a matrix, contiguous; a view of ``X`` if that is enough."""
    return X.t().contiguous()


def _tensor(csr: CSR, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(csr.crow, csr.col, values, csr.shape)
