"""Truly sparse layers: parameters, gradients, optimizer state and time in proportion to the nonzeros."""

from lightning_sparse.layers.sparse import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    make_dense_,
    make_sparse_,
    to_dense,
)
from lightning_sparse.storage.checkpoint import load_dense

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear", "load_dense", "make_dense_", "make_sparse_", "to_dense"]
