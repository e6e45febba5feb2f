"""ITOP: in-time over-parameterization (Liu et al., ICML 2021).

Section 4. The updates of RigL or SET, but rare ones that move many connections for the whole of the training, so that
in the end nearly all weights have been active once. Decisions as in ``rigl.py`` and ``set.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from lightning_sparse.accounting.masks import Explored
from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import sampling
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Weight

__all__ = ["ITOP"]


Growth = Literal["gradient", "random"]


class ITOP(SparseStorage, PruneAndGrow):
    """In-Time Over-Parameterization: RigL or SET with long intervals, and a measure of what has been explored.

    ``exploration_rate`` (logged as ``sparsity/explored``) is the paper's R_s: the share of weights that have been
    active at any time.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        growth: ``"gradient"`` (RigL-ITOP; the step that moves connections applies no update) or ``"random"``
            (SET-ITOP).
        drop_fraction: share of a layer's connections that the first update drops, in (0, 1].
        decay: how that share falls until the end of the updates: ``"cosine"``, ``"linear"``, ``"none"``.
        update_every: number of optimizer steps from update to update, long enough for new weights to grow; None: at the
            first step of each epoch but the first.
        stop_at: share of the training after which connections stay, in (0, 1].
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only), beside a bit for each
            weight that tells what has been active; updates by gradient compute that of some rows at a time.
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import ITOP
        >>> callback = ITOP(sparsity=0.9, growth="random")

    Reference:
        "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training", ICML 2021.
    """

    def __init__(
        self,
        sparsity: float,
        growth: Growth = "gradient",
        drop_fraction: float = 0.5,
        decay: Decay = "cosine",
        update_every: int | None = 1500,
        stop_at: float = 1.0,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, decay, update_every, stop_at, storage=storage, **options)
        checks.one_of(get_args(Growth), growth=growth)
        self.growth = growth
        self._explored = Explored()
        self.skips_update = self.dense_gradient_to_move = growth == "gradient"

    @property
    def exploration_rate(self) -> float:
        """R_s: the share of all selected weights that have been active at any time."""
        if not self._weights:
            raise RuntimeError("ITOP has no weights yet: they are chosen when trainer.fit starts.")
        return self._explored.rate(self._weights)

    @property
    def watched(self) -> dict[str, float]:
        """R_s is logged, too."""
        return {"sparsity/explored": self.exploration_rate}

    @property
    def held(self) -> list[Mapping[str, Any]]:
        """The explored connections, too."""
        return [*super().held, self._explored.bits]

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over, and forget those of an earlier fit."""
        super().attach(choices, optimizers, resumed)
        self._explored.keep(self._weights)
        self._explore([weight for name, weight in self._weights.items() if name not in self._explored.bits])

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin with the first connections."""
        super().initial_masks(weights)
        self._explore(weights)

    def _explore(self, weights: Sequence[Weight]) -> None:
        for weight in weights:
            self._explored.start(weight.name, weight.positions, weight.size)
            weight.forget_places()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been explored, too."""
        return {**super().state_dict(), "explored": self._explored.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._explored.load_state_dict(state_dict["explored"])

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """In each layer drop the smallest ``|W|``, grow by ``|dP|`` or at random, and note what has been grown."""
        for weight in weights:
            n = self.to_move(weight, fraction)
            if self.growth == "gradient":
                grown, _ = weight.steepest(n)
            else:
                grown = sampling.free_positions(n, weight.positions, weight.size, self.generator)
            weight.exchange(weight.smallest(n), grown)
            self._explored.mark(weight.name, grown)
