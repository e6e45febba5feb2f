"""Sparse training for PyTorch Lightning: each method is one callback."""

from lightning_sparse.callback import SparseCallback
from lightning_sparse.methods.autosparse import AutoSparse
from lightning_sparse.methods.dfbst import DFBST
from lightning_sparse.methods.dst import DST
from lightning_sparse.methods.rigl import RigL
from lightning_sparse.methods.set import SET
from lightning_sparse.methods.str import STR

__all__ = [
    "DFBST",
    "DST",
    "SET",
    "STR",
    "AutoSparse",
    "RigL",
    "SparseCallback",
    "__version__",
]

__version__ = "0.1.0"
