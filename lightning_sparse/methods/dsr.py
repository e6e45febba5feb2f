"""DSR: dynamic sparse reparameterization (Mostafa & Wang, ICML 2019).

Algorithm 1. Decisions: the target, a number in the paper, is a share of the connections; what was just dropped is not
drawn again; a full layer passes its rest on to the others in proportion; each optimizer has a threshold of its own; a
layer that lies below the threshold as a whole keeps its largest connection, as in the authors' program.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.families.shares import droppable, shared_out
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import portion
from lightning_sparse.rules.clock import Clock
from lightning_sparse.rules.parts import together
from lightning_sparse.rules.schedules import Decay
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["DSR"]


def _check_shares(**argument: Sequence[float]) -> None:
    """Raise unless the one keyword argument is a list of shares of the training."""
    ((name, shares),) = argument.items()
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise ValueError(f"{name} must be a list of numbers, got {shares!r}. The authors' is [0.125, 0.4, 0.7].")
    for share in shares:
        checks.fraction("The authors' shares are 0.125, 0.4 and 0.7.", above_0=True, below_1=True, **{name: share})


class DSR(PruneAndGrow):
    """Dynamic Sparse Reparameterization: one adaptive threshold; layers that keep more connections get more new ones.

    All connections with ``|W| < H`` are dropped, and as many are grown at random: each layer gets new ones in
    proportion to those that it keeps.
    H is doubled if fewer than ``1 - tolerance`` of the target were dropped, and halved if more than ``1 + tolerance``.

    Example:
        >>> from lightning_sparse import DSR
        >>> callback = DSR(sparsity=0.9)

    Reference:
        "Parameter efficient training of deep convolutional neural networks by dynamic sparse reparameterization",
        ICML 2019.
    """

    drop_fraction: float = option(default=0.1, doc="target share of all connections to drop in an update, in (0, 1].")
    init_threshold: float = option(
        default=1e-3, check=partial(checks.above, 0, "The paper's value is 1e-3."), doc="H at the start, above 0."
    )
    tolerance: float = option(
        default=0.1,
        check=partial(checks.fraction, "The paper's value is 0.1.", below_1=True),
        doc="the paper's delta, in [0, 1).",
    )
    decay: Decay = "none"
    stop_at: float = 0.9
    double_interval_at: Sequence[float] = option(
        default=(),
        check=_check_shares,
        doc="shares of the training, in (0, 1), after each of which the interval between updates doubles; the "
        "authors' 100, 200, 400 and 800 steps in a training of 200 epochs are ``[0.125, 0.4, 0.7]`` with "
        "``update_every=100`` and ``stop_at=0.95``.",
    )
    resizes = True
    unfit_patterns = dict.fromkeys(
        ("N:M", "block", "row"),
        "it drops each connection by itself, by one threshold of |W| for all layers. Use SET or RigL.",
    )

    def __post_init__(self) -> None:
        """Hold the shares as a list, as a record of the run does."""
        super().__post_init__()
        self.double_interval_at = list(self.double_interval_at)

    @property
    def clock(self) -> Clock:
        """When connections move: ever less often, if asked for."""
        clock = super().clock
        length = clock.end / self.stop_at
        return replace(clock, doubling=tuple(share * length for share in self.double_interval_at))

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Drop what is below H in all layers, adapt H, and grow as many."""
        H = group.values.setdefault("threshold", self.init_threshold)
        below = together(weights).total(*(select.count(weight.magnitudes < H) for weight in weights))
        drops = [min(n, max(weight.num_active - 1, 0)) for weight, n in zip(weights, below, strict=True)]
        target = portion(self.fraction(group), sum(weight.num_active for weight in weights))
        low, high = (1 - self.tolerance) * target, (1 + self.tolerance) * target
        group.values["threshold"] = 2 * H if sum(below) < low else H / 2 if sum(below) > high else H
        self.rewire(weights, droppable(weights, drops, self.min_layer_density), scale)

    def grow_counts(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Share out what was dropped by the layers' survivors."""
        survivors = [weight.num_active - n for weight, n in zip(weights, drops, strict=True)]
        return shared_out(weights, drops, survivors, self.min_layer_density)

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow at random where nothing was."""
        return self.pattern.grow_at_random(weight, n, dropped, self.generator)

    @property
    def threshold(self) -> float:
        """The present H (of the first optimizer that has weights)."""
        return self._groups.value("threshold", self.init_threshold)

    @property
    def extra_metrics(self) -> dict[str, float]:
        """H is logged, too."""
        return {"sparsity/threshold": self.threshold}
