"""Methods beside each other: one recipe, several methods, sparsities and seeds; one table and one plot.

``recipe`` and ``plan`` say what is compared, ``runs`` trains it in processes, ``results`` reads what they have left and
makes the table, ``figure`` draws it, ``command`` is ``lightning-sparse compare``.
"""

from lightning_sparse.compare.command import main

__all__ = ["main"]
