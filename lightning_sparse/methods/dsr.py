"""DSR: dynamic sparse reparameterization (Mostafa & Wang, ICML 2019).

Algorithm 1. Decisions: the target number to drop, absolute in the paper, is a share of the connections; connections
that were just dropped are not drawn again; a layer that gets more than it has room for passes the rest on to the others
in proportion; each optimizer has a threshold of its own.
"""

from collections.abc import Sequence
from typing import Any

from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import sampling, select
from lightning_sparse.rules.budgets import share
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Pool, Weight

__all__ = ["DSR"]


class DSR(SparseStorage, PruneAndGrow):
    """Dynamic Sparse Reparameterization: one adaptive threshold for all layers; who keeps more gets more.

    All connections with ``|W| < H`` are dropped, and as many are grown at random, shared out among layers in proportion
    to their survivors. H is doubled if fewer than ``1 - tolerance`` of the target were dropped, and halved if more than
    ``1 + tolerance``.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        drop_fraction: the target: share of all connections to drop in an update, in (0, 1].
        init_threshold: H at the start, above 0.
        tolerance: the paper's delta, in [0, 1).
        decay: how the target falls until the end of the updates: ``"none"`` (the paper's), ``"cosine"``, ``"linear"``.
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
        >>> from lightning_sparse import DSR
        >>> callback = DSR(sparsity=0.9)

    Reference:
        "Parameter efficient training of deep convolutional neural networks by dynamic sparse reparameterization",
        ICML 2019.
    """

    resizes = True

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float = 0.1,
        init_threshold: float = 1e-3,
        tolerance: float = 0.1,
        decay: Decay = "none",
        update_every: int | None = 100,
        stop_at: float = 0.9,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)
        checks.above(0, "The paper's value is 1e-3.", init_threshold=init_threshold)
        checks.fraction("The paper's value is 0.1.", below_1=True, tolerance=tolerance)
        self.init_threshold = init_threshold
        self.tolerance = tolerance

    @property
    def threshold(self) -> float:
        """The present H (of the first optimizer that has weights)."""
        clocks = [pool.clock for pool in self._pools.values() if pool.weights] or self._clocks
        found = [clock["values"]["threshold"] for clock in clocks if "threshold" in clock["values"]]
        return float(found[0]) if found else self.init_threshold

    @property
    def watched(self) -> dict[str, float]:
        """H is logged, too."""
        return {"sparsity/threshold": self.threshold}

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Drop what is below H in all layers, adapt H, and grow at random in proportion to each layer's survivors."""
        H = pool.values.setdefault("threshold", self.init_threshold)
        below = [select.count(weight.magnitudes < H) for weight in weights]
        target = share(self.fraction(pool), sum(weight.active for weight in weights))
        pool.values["threshold"] = adapted(H, sum(below), target, self.tolerance)

        drops = self.to_drop(weights, below)
        survivors = [weight.active - n for weight, n in zip(weights, drops, strict=True)]
        grows = self.to_grow(weights, drops, survivors)
        for weight, fewer, more in zip(weights, drops, grows, strict=True):
            grown = sampling.free_positions(more, weight.positions, weight.size, self.generator)
            weight.exchange(weight.smallest(fewer), grown)


def adapted(threshold: float, dropped: int, target: int, tolerance: float) -> float:
    """Return the threshold of the next update.

    >>> adapted(1.0, 8, 10, 0.1), adapted(1.0, 9, 10, 0.1), adapted(1.0, 12, 10, 0.1)
    (2.0, 1.0, 0.5)
    """
    if dropped < (1 - tolerance) * target:
        return 2 * threshold
    if dropped > (1 + tolerance) * target:
        return threshold / 2
    return threshold
