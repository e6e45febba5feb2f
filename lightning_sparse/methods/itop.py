"""ITOP: in-time over-parameterization (Liu et al., ICML 2021).

Section 4. The updates of RigL or SET, but rare ones that move many connections for the whole of the training, so that
in the end nearly all weights have been active once. Decisions as in ``rigl.py`` and ``set.py``.
"""

from typing import Literal

from torch import Tensor

from lightning_sparse.compat.options import option
from lightning_sparse.families.exploring import Exploring
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.weights.base import Weight

__all__ = ["ITOP"]

Growth = Literal["gradient", "random"]


class ITOP(Exploring, PruneAndGrow):
    """In-Time Over-Parameterization: RigL or SET with long intervals, and a measure of what has been explored.

    ``exploration_rate`` (logged as ``sparsity/explored``) is the paper's R_s: the share of weights that have been
    active at any time. It takes a bit for each weight, also with ``storage="sparse"``.

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
    stop_at: float = 1.0

    def __post_init__(self) -> None:
        """The step that grows by gradient applies no update."""
        super().__post_init__()
        self.skips_update = self.dense_gradient_to_move = self.growth == "gradient"

    @property
    def paper_update_every(self) -> int:
        """The authors' interval on CIFAR, in optimizer steps: growth by gradient gives new weights longer."""
        return 4000 if self.growth == "gradient" else 1500

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow by ``|dP|`` or at random, and note what has been grown."""
        if self.growth == "gradient":
            grown = self.pattern.grow_by_gradient(weight, n, dropped)
        else:
            grown = self.pattern.grow_at_random(weight, n, dropped, self.generator)
        self.explored.mark(weight.name, weight.part.indices(grown))
        return grown
