"""RandomPruning: a random mask, drawn before training and kept (Liu et al., ICLR 2022).

Decision: each layer's number of connections is exact, where a draw for each connection would meet it on average.
"""

from collections.abc import Mapping
from typing import Any

from lightning_sparse.rules.budgets import Distribution
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage

__all__ = ["RandomPruning"]


class RandomPruning(SparseStorage):
    """Random pruning at initialization: every layer keeps its share of connections, drawn uniformly.

    The baseline that every other method has to beat. It needs neither data nor a loss.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        distribution: how the active weights are divided among layers: ``"erk"``, ``"er"``, ``"uniform"``,
            ``"uniform_first_dense"``, or a density for each glob pattern on parameter names.
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only).
        options: ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import RandomPruning
        >>> callback = RandomPruning(sparsity=0.9, distribution="erk")

    Reference:
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        ICLR 2022.
    """

    moves = False

    def __init__(
        self,
        sparsity: float,
        distribution: Distribution | Mapping[str, float] = "erk",
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, distribution, storage=storage, **options)
