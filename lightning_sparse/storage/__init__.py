"""Truly sparse layers: parameters, gradients, optimizer state and time in proportion to the nonzeros."""

from collections.abc import Callable

from lightning_sparse.layers.blocks import BlockLinear, make_blocks_
from lightning_sparse.layers.sparse import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    make_dense_,
    make_sparse_,
    to_dense,
)
from lightning_sparse.storage.blocks import BlockStore
from lightning_sparse.storage.checkpoint import load_dense
from lightning_sparse.storage.masked import MaskedStore
from lightning_sparse.storage.sparse import SparseStore
from lightning_sparse.storage.store import Storage, Store, Stored

__all__ = [
    "STORES",
    "BlockLinear",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "load_dense",
    "make_blocks_",
    "make_dense_",
    "make_sparse_",
    "to_dense",
]

#: the stores by the names of the argument ``storage``
STORES: dict[Storage, Callable[[Stored], Store]] = {
    "masked": MaskedStore,
    "sparse": SparseStore,
    "block": BlockStore,
}
