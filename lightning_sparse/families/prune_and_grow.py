"""PruneAndGrow: the base of methods that drop some connections now and then and grow as many others.

A method is a composition: what it drops (``drop_scores``), what it grows (``grow``), how many in each layer
(``drop_counts``, ``grow_counts``), which connections go together (``pattern``), and when (the clock).
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import rank_zero_info
from lightning_sparse.compat.options import option
from lightning_sparse.families.common import Interval, check_interval
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.families.watch import Watch
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules import criteria
from lightning_sparse.rules.budgets import portion
from lightning_sparse.rules.clock import FEW, UPDATES, Clock, interval, spoken, times
from lightning_sparse.rules.schedules import DECAYS, Decay
from lightning_sparse.trainer.fit import epochs
from lightning_sparse.trainer.guards import refuse_unknown_length
from lightning_sparse.trainer.updates import unscales
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["PruneAndGrow"]

_FIXED = "RandomPruning is the method whose connections stay."


class PruneAndGrow(MaskedCallback):
    """A fixed budget of connections, a share of which is moved now and then.

    A method defines ``grow``, and what it does otherwise than to drop the same share of each layer's smallest weights.
    """

    drop_fraction: float = option(
        default=0.3,
        check=partial(checks.fraction, f"Usual values are 0.1 to 0.5. {_FIXED}", above_0=True),
        doc="share of a layer's connections that the first update drops, in (0, 1].",
    )
    decay: Decay = option(
        default="cosine",
        doc='how that share falls until the end of the updates: ``"cosine"``, ``"linear"``, ``"sigmoid"``, '
        '``"sigmoid_cosine"``, ``"halving"`` (half of it from three quarters of the way on) or ``"none"``.',
    )
    update_every: Interval | None = option(
        default="auto",
        check=check_interval,
        doc="number of optimizer steps from update to update; None: at the first step of each epoch but the first; "
        f'``"auto"``: the paper\'s interval, or a shorter one with which the training has {UPDATES} updates.',
    )
    stop_at: float = option(
        default=0.75,
        check=partial(checks.fraction, f"RigL's value is 0.75. {_FIXED}", above_0=True),
        doc="share of the training after which connections stay, in (0, 1].",
    )

    #: the value that grown connections begin with
    new_value = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._epochs: int | None = None
        self._every = None if self.update_every == "auto" else self.update_every
        self._watch = Watch(self)

    # ------------------------------------------------------------------ what a method defines

    def drop_scores(self, weight: Weight, scale: float) -> Tensor:
        """Return the score of each active connection; the least are dropped. Gradients are times ``scale``."""
        return criteria.magnitude(weight)

    def drop(self, weight: Weight, n: int, scale: float) -> Tensor:
        """Return the flat positions, ascending, of the ``n`` active connections that go: those of least score."""
        return self.pattern.drop(weight, self.drop_scores(weight, scale), n)

    @abstractmethod
    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Return the flat positions, ascending, of ``n`` inactive connections that take the place of ``dropped``."""

    def drop_counts(self, weights: Sequence[Weight], fraction: float) -> list[int]:
        """Return how many connections each layer drops: the same share, but no more than others can take the place of.

        So none that is dropped has to come back in the same update.
        """
        return [min(portion(fraction, weight.num_active), self.pattern.num_movable(weight)) for weight in weights]

    def grow_counts(self, weights: Sequence[Weight], drops: Sequence[int]) -> Sequence[int]:
        """Return how many connections each layer grows, as many in all as ``drops``."""
        return drops

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Move connections with ``rewire``.

        Args:
            weights: those that have a gradient now; it is the same on all processes.
            fraction: share of the connections to move.
            scale: what gradients are multiplied with (under AMP).
        """
        self.rewire(weights, self.drop_counts(weights, fraction), scale)

    def rewire(self, weights: Sequence[Weight], drops: Sequence[int], scale: float) -> None:
        """Drop so many connections of each layer, and grow as many in all."""
        grows = self.grow_counts(weights, drops)
        for weight, fewer, more in zip(weights, drops, grows, strict=True):
            weight.hold_indices()
            dropped = self.drop(weight, fewer, scale)
            weight.rewire(dropped, self.grow(weight, more, dropped), self.new_value)

    # ------------------------------------------------------------------ when

    @property
    def paper_update_every(self) -> int | None:
        """The paper's interval in optimizer steps; None: once an epoch."""
        return 100

    @property
    def clock(self) -> Clock:
        """When connections move: in optimizer steps, or in epochs where they move once an epoch."""
        if self._every is None:
            assert self._epochs is not None
            return Clock(every=1, end=self.stop_at * self._epochs)
        return Clock(self._every, end=self.stop_at * self.total_steps)

    def interval(self, epochs: int | None) -> int | None:
        """Return the number of steps from update to update; None: once in each of the ``epochs``."""
        if self.update_every != "auto":
            return self.update_every
        paper, steps = self.paper_update_every, self.stop_at * self.total_steps
        if paper is not None:
            return interval(paper, steps)
        if epochs is None or math.isinf(steps) or self.stop_at * epochs > UPDATES:
            return None
        return interval(math.ceil(self.total_steps / epochs), steps)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Settle how often connections move, make sure that they do, and tell."""
        self._every = self.interval(epochs(trainer))
        super().on_train_start(trainer, pl_module)
        known = self._every is not None or self._epochs is not None
        purpose = f"of which it moves connections in the first {self.stop_at:.0%}"
        refuse_unknown_length(self, self.total_steps, purpose, known)
        last = self.total_steps - 1 if self._every else (self._epochs or 1) - 1
        self._tell(list(self.clock.ticks(int(last))))

    def _tell(self, ticks: Sequence[int]) -> None:
        """Show the plan; warn of one that moves little."""
        every, unit = (self._every, "step") if self._every else (1, "epoch")
        if ticks:
            shares = [self.fraction_at(tick) for tick in ticks]
            first, last = f"{shares[0]:.1%} of them", f"{shares[-1]:.1%} at last, {sum(shares):.2f} times all in sum"
            moved = f"{first} at first, {last}." if len(ticks) > 1 else f"{first}."
            now = min((group.step for group in self._groups), default=0) if self._every else self._epoch
            left = sum(tick >= now for tick in ticks)
            resumed = f" It goes on from {unit} {now}: {left} of these moves are to come." if left < len(ticks) else ""
            rank_zero_info(f"{self!r} moves connections {spoken(ticks, every, unit)}: {moved}{resumed}")
        if len(ticks) < FEW:
            moves = f"connections only {times(len(ticks))}" if ticks else "no connection"
            self.warn_once(
                f"{self!r} will move {moves}: the training is too short for its settings. "
                "Lower update_every, raise stop_at, or train longer."
            )

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Make the connections due at the epoch's first step, if they are moved epoch by epoch."""
        self._epochs = epochs
        entered = epoch != self._epoch
        super().begin_epoch(epoch, epochs)
        if entered and self._every is None and epochs is not None and self.clock.is_due(epoch):
            for group in self._groups:
                group.due = True

    def is_due(self, group: WeightGroup) -> bool:
        """Tell whether this step is one of those at which connections move."""
        if self._every is None or group.step == 0 or group.step % self._every:
            return False  # at most steps, without asking how long the training is
        return self.clock.is_due(group.step)

    def fraction_at(self, tick: float) -> float:
        """Return the share of connections to drop at a tick of the clock."""
        first = 1 if self._every is None else 0  # from the first update, in epoch 1, to the end
        return self.drop_fraction * DECAYS[self.decay]((tick - first) / max(self.clock.end - first, 1e-9))

    def fraction(self, group: WeightGroup) -> float:
        """Return the share of connections to drop now."""
        return self.fraction_at(self._epoch if self._every is None else group.step)

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Update with the current fraction."""
        self.update(weights, self.fraction(group), scale)

    # ------------------------------------------------------------------ what an update needs of its step

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Return what listens to the layers of ``weights`` from now until their connections have been moved."""
        return self.store.watch(weights, partial(self._whole, weights[0].optimizer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the layers if the next step moves connections."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._watch.begin()

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Move connections if they are due, and watch no longer."""
        try:
            super().before_step(optimizer, share, scale)
        finally:
            self._watch.end(optimizer)

    def after_update(self, optimizer: Optimizer) -> None:
        """Bring back exact zeros, and watch the layers if the next step moves connections and may be in this batch."""
        super().after_update(optimizer)
        if self._fit.module is not None and not self._fit.module.automatic_optimization:
            self._watch.begin()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave effective weights and no hooks behind."""
        super().on_exception(trainer, pl_module, exception)
        self._watch.end()

    def _release(self) -> None:
        super()._release()
        if "_watch" in vars(self):
            self._watch.end()

    def _whole(self, optimizer: Optimizer | None, gradient: Tensor) -> Tensor:
        """Make of a gradient with the loss scale, of this process, one as the parameters of ``optimizer`` have it."""
        assert self._fit.trainer is not None
        scaler: Any = getattr(self._fit.trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales(optimizer):
            gradient = gradient / scaler.get_scale()
        return cast(Tensor, self._fit.trainer.strategy.reduce(gradient, reduce_op="mean"))
