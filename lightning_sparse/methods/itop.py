"""ITOP: in-time over-parameterization (Liu et al., ICML 2021).

Section 4. The updates of RigL or SET, but rare ones that move many connections for the whole of the training, so that
in the end nearly all weights have been active once. Decisions as in ``rigl.py`` and ``set.py``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.accounting.masks import Explored
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.weights.base import Weight

__all__ = ["ITOP"]

Growth = Literal["gradient", "random"]


class ITOP(PruneAndGrow):
    """In-Time Over-Parameterization: RigL or SET with long intervals, and a measure of what has been explored.

    ``exploration_rate`` (logged as ``sparsity/explored``) is the paper's R_s: the share of weights that have been
    active at any time. It takes a bit for each weight, also with ``storage="sparse"``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import ITOP
        >>> callback = ITOP(sparsity=0.9, growth="random")

    Reference:
        "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training", ICML 2021.
    """

    growth: Growth = option(
        default="gradient",
        doc='``"gradient"`` (RigL-ITOP; the step that moves connections applies no update) or ``"random"`` (SET-ITOP).',
    )
    drop_fraction: float = 0.5
    update_every: int | None = option(
        default=1500,
        doc="number of optimizer steps from update to update, long enough for new weights to grow; None: at the first "
        "step of each epoch but the first.",
    )
    stop_at: float = 1.0

    def __post_init__(self) -> None:
        """Make the state."""
        super().__post_init__()
        self._explored = Explored()
        self.skips_update = self.dense_gradient_to_move = self.growth == "gradient"

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow by ``|dP|`` or at random, and note what has been grown."""
        if self.growth == "gradient":
            grown = self.pattern.grow_by_gradient(weight, n, dropped)
        else:
            grown = self.pattern.grow_at_random(weight, n, dropped, self.generator)
        self._explored.mark(weight.name, grown)
        return grown

    # ------------------------------------------------------------------ what has been explored

    @property
    def exploration_rate(self) -> float:
        """R_s: the share of all selected weights that have been active at any time."""
        if not self._weights:
            raise RuntimeError(f"{self!r} has no weights yet: they are chosen when trainer.fit starts.")
        return self._explored.rate(self._weights)

    @property
    def extra_metrics(self) -> dict[str, float]:
        """R_s is logged, too."""
        return {"sparsity/explored": self.exploration_rate}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The explored connections, too."""
        return [*super().state_tensors, self._explored.bits]

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over, and forget those of an earlier fit."""
        super().attach(choices, optimizers, resumed)
        self._explored.keep(self._weights)
        self._explore(weight for name, weight in self._weights.items() if name not in self._explored.bits)

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin with the first connections."""
        super().initial_masks(weights)
        self._explore(weights)

    def _explore(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            self._explored.start(weight.name, weight.active_indices.cpu(), weight.size)
            weight.forget_indices()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been explored, too."""
        return {**super().state_dict(), "explored": self._explored.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._explored.load_state_dict(state_dict["explored"])
