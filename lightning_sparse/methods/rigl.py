"""RigL: rigging the lottery (Evci et al., ICML 2020).

Algorithm 1. Decisions: connections that were just dropped are not grown again, so a layer moves no more of them than it
has free places; new ones start at 0; the gradient is that of the step's own batch (or accumulated batches), averaged
over processes.
"""

from collections.abc import Sequence
from typing import Any

from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Weight

__all__ = ["RigL"]


class RigL(SparseStorage, PruneAndGrow):
    """Rigged Lottery: drop the smallest weights of each layer, grow where the dense gradient is largest.

    The step that moves connections applies no optimizer update.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        drop_fraction: the paper's alpha, share of a layer's connections that the first update drops, in (0, 1].
        decay: how that share falls until the end of the updates: ``"cosine"`` (the paper's), ``"linear"``, ``"none"``
        update_every: number of optimizer steps from update to update; None: at the first step of each epoch but the
            first.
        stop_at: share of the training after which connections stay, in (0, 1].
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only); updates compute the
            gradient of some rows at a time.
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import RigL
        >>> callback = RigL(sparsity=0.9, distribution="erk")

    Reference:
        "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """

    skips_update = True
    dense_gradient_to_move = True

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.3,
        decay: Decay = "cosine",
        update_every: int | None = 100,
        stop_at: float = 0.75,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """In each layer drop the smallest ``|W|`` and grow the largest ``|dP|`` where nothing was."""
        for weight in weights:
            n = self.to_move(weight, fraction)
            grown, _ = weight.steepest(n)
            weight.exchange(weight.smallest(n), grown)
