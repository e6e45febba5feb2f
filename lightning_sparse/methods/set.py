"""SET: sparse evolutionary training (Mocanu et al., Nature Communications 2018).

Section "Methods" of the paper. Decisions: the update runs at the first step of an epoch, which is where the one before
ended; connections that were just dropped are not drawn again; new ones start at 0.
"""

from collections.abc import Sequence
from typing import Any

from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import sampling
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Weight

__all__ = ["SET"]


class SET(SparseStorage, PruneAndGrow):
    """Sparse Evolutionary Training: drop the smallest weights of each layer, grow as many at random.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        drop_fraction: the paper's zeta, share of a layer's connections that an update drops, in (0, 1].
        decay: how that share falls until the end of the updates: ``"none"`` (the paper's), ``"cosine"``, ``"linear"``
        update_every: number of optimizer steps from update to update; None: at the first step of each epoch but the
            first.
        stop_at: share of the training after which connections stay, in (0, 1].
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only).
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import SET
        >>> callback = SET(sparsity=0.9, exclude=["*.head.weight"])

    Reference:
        "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
        science", Nature Communications 9 (2018).
    """

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.3,
        decay: Decay = "none",
        update_every: int | None = None,
        stop_at: float = 1.0,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """In each layer drop the smallest ``|W|`` and grow at random where nothing was."""
        for weight in weights:
            n = self.to_move(weight, fraction)
            grown = sampling.free_positions(n, weight.positions, weight.size, self.generator)
            weight.exchange(weight.smallest(n), grown)
