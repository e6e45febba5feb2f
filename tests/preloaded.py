"""What a process that ``processes.py`` starts has behind it: the imports, which take longer than a short training."""

import contextlib
import gc
import importlib

import helpers  # noqa: F401

for name in ("cli", "zoo.data", "zoo.models", "kernels.positions_numba", "kernels.thresholds_numba"):
    with contextlib.suppress(ImportError):  # of an extra
        importlib.import_module(f"lightning_sparse.{name}")
gc.freeze()  # what is there is never looked through again: its pages stay shared
