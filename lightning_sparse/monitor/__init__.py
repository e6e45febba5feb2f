"""SparsityMonitor: writes the record of a run, sparse or dense, to its loggers and to ``sparsity.json``."""

from lightning_sparse.monitor.callback import SparsityMonitor

__all__ = ["SparsityMonitor"]
