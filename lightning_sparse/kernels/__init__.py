"""The arithmetic of thresholds, in torch or, on CPU with the extra ``fast``, in compiled loops.

``LIGHTNING_SPARSE_KERNELS=torch`` (or ``numba``) forces one of them. The functions are those of ``torch_kernels``.
"""

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lightning_sparse.kernels import torch_kernels

__all__ = ["for_tensors"]


def _wanted() -> str:
    """Return which kernels the environment asks for: ``"auto"``, ``"torch"`` or ``"numba"``."""
    wanted = os.environ.get("LIGHTNING_SPARSE_KERNELS", "auto")
    if wanted not in ("auto", "torch", "numba"):
        raise ValueError(f"LIGHTNING_SPARSE_KERNELS must be 'auto', 'torch' or 'numba', got {wanted!r}.")
    return wanted


@cache
def _numba() -> ModuleType | None:
    """Return the compiled kernels, or None where they are not wanted or not installed."""
    wanted = _wanted()
    if wanted == "torch":
        return None
    try:
        return importlib.import_module("lightning_sparse.kernels.numba_kernels")
    except ImportError as error:
        if wanted == "numba":
            raise ImportError(
                "LIGHTNING_SPARSE_KERNELS=numba needs numba. In a clone of lightning_sparse: pip install '.[fast]'"
            ) from error
        return None


def for_tensors(matrix: Tensor, tau: Tensor) -> ModuleType:
    """Return the module of kernels that suits these tensors best."""
    compiled = (
        matrix.device.type == "cpu"
        and matrix.dtype == tau.dtype
        and matrix.dtype in (torch.float32, torch.float64)
        and tau.shape[1] == 1
        and matrix.is_contiguous()
    )
    return (_numba() if compiled else None) or torch_kernels
