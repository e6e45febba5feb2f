"""PruneAndGrow: the base of methods that drop some connections now and then and grow as many others."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.compiled import Uncompiled, can_pause, is_compiled
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules.budgets import apportion, share
from lightning_sparse.rules.schedules import DECAYS, Decay
from lightning_sparse.trainer.callback import unscales
from lightning_sparse.weights.base import Pool, Weight
from lightning_sparse.weights.sparse import Capture

__all__ = ["PruneAndGrow"]


class PruneAndGrow(MaskedCallback):
    """A fixed budget of connections, a share of which is moved now and then.

    Args:
        sparsity: see ``MaskedCallback``.
        drop_fraction: share of a layer's connections that the first update drops, in (0, 1].
        decay: how that share falls until the end of the updates: ``"cosine"`` as in RigL, ``"linear"``, ``"sigmoid"``,
            ``"sigmoid_cosine"`` or ``"none"``.
        update_every: number of optimizer steps from update to update; None: at the first step of each epoch but the
            first.
        stop_at: share of the training after which connections stay, in (0, 1].
        options: see ``MaskedCallback``.
    """

    def __init__(
        self,
        sparsity: float,
        drop_fraction: float,
        decay: Decay,
        update_every: int | None,
        stop_at: float,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, **options)
        fixed = "RandomPruning is the method whose connections stay."
        checks.fraction(f"Usual values are 0.1 to 0.5. {fixed}", above_0=True, drop_fraction=drop_fraction)
        checks.one_of(DECAYS, decay=decay)
        checks.fraction(f"RigL's value is 0.75. {fixed}", above_0=True, stop_at=stop_at)
        if update_every is not None:
            checks.integer(1, "None updates once an epoch.", update_every=update_every)
        self.drop_fraction = drop_fraction
        self.decay = decay
        self.update_every = update_every
        self.stop_at = stop_at
        self._epochs: int | None = None
        self._hooks: dict[int, list[Hooks | Uncompiled]] = {}

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop about ``fraction`` of the connections and grow as many, with ``Weight.exchange``.

        What a method defines, unless it needs the pool and defines ``move``.

        Args:
            weights: those that have a gradient now; dense, the same on all processes.
            fraction: share of the connections to move.
            scale: what gradients are multiplied with (under AMP).
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that there will be updates."""
        super().on_train_start(trainer, pl_module)
        known = self.update_every is not None or self._epochs is not None
        self._require_length(f"of which it moves connections in the first {self.stop_at:.0%}", known)
        if self.update_every is None:
            updates = math.ceil(self._last_epoch()) - 1
        else:
            updates = math.ceil(self.stop_at * self.total_steps / self.update_every) - 1
        if updates < 1:
            self._warn_once(
                f"{type(self).__name__} will move no connection: the training is too short for its settings. "
                "Lower update_every, raise stop_at, or train longer."
            )

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Make the connections due at the epoch's first step, if they are moved epoch by epoch."""
        self._epochs = epochs
        entered = epoch != self._epoch
        super().begin_epoch(epoch, epochs)
        if entered and self.update_every is None and epochs is not None and 0 < epoch < self._last_epoch():
            for pool in self._pools.values():
                pool.due = True

    def is_due(self, pool: Pool) -> bool:
        """Tell whether this step is one of every ``update_every``."""
        every = self.update_every
        if every is None or pool.step == 0 or pool.step % every:
            return False
        return pool.step < self.stop_at * self.total_steps

    def fraction(self, pool: Pool) -> float:
        """Return the share of connections to drop now."""
        if self.update_every is None:  # from the first update, in epoch 1, to the end
            now, end = float(self._epoch - 1), self._last_epoch() - 1
        else:
            now, end = float(pool.step), self.stop_at * self.total_steps
        return self.drop_fraction * DECAYS[self.decay](now / max(end, 1e-9))

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Update with the current fraction."""
        self.update(weights, self.fraction(pool), scale)

    # ------------------------------------------------------------------ what an update needs of its step

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Return what listens to the layers of ``weights`` from now until their connections have been moved."""
        if self.storage == "masked":
            return []
        return [Capture(weights, partial(self._whole, weights[0].optimizer))]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the layers if the next step moves connections."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._watch()

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Move connections if they are due, and watch no longer."""
        try:
            super().before_step(optimizer, share, scale)
        finally:
            self._unwatch([id(optimizer)])

    def after_step(self, optimizer: Optimizer) -> None:
        """Bring back exact zeros, and watch the layers if the next step moves connections and may be in this batch."""
        super().after_step(optimizer)
        if self._module is not None and not self._module.automatic_optimization:
            self._watch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave effective weights and no hooks behind."""
        super().on_exception(trainer, pl_module, exception)
        self._unwatch(list(self._hooks))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the hooks, too."""
        return {**super().__getstate__(), "_hooks": {}}

    def _release(self) -> None:
        super()._release()
        self._unwatch(list(self._hooks))

    def _whole(self, optimizer: Optimizer | None, gradient: Tensor) -> Tensor:
        """Make of a gradient with the loss scale, of this process, one as the parameters of ``optimizer`` have it."""
        assert self._trainer is not None
        scaler: Any = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales(optimizer):
            gradient = gradient / scaler.get_scale()
        return cast(Tensor, self._trainer.strategy.reduce(gradient, reduce_op="mean"))

    def _watch(self) -> None:
        if self._module is None:
            return
        for key, pool in self._pools.items():
            if pool.weights and key not in self._hooks and (pool.due or self.is_due(pool)):
                listeners = self.watchers(pool.weights)
                self._hooks[key] = [*listeners, Uncompiled()] if listeners else []  # compiled code would not tell
                if listeners and not can_pause() and is_compiled(self._module):
                    self._warn_once(
                        f"{type(self).__name__} moves connections by what enters and leaves the layers, which compiled "
                        "ones do not tell: connections may grow in the wrong places. Update to PyTorch 2.6 or later, "
                        "or train uncompiled."
                    )

    def _unwatch(self, keys: Sequence[int]) -> None:
        for key in keys:
            for hooks in self._hooks.pop(key, []):
                hooks.close()

    def _last_epoch(self) -> float:
        assert self._epochs is not None
        return self.stop_at * self._epochs

    # ------------------------------------------------------------------ how many

    def to_move(self, weight: Weight, fraction: float) -> int:
        """Return ``fraction`` of a layer's connections, or its free places if they are fewer.

        So none that is dropped has to come back in the same update.
        """
        return min(share(fraction, weight.active), weight.room)

    # ------------------------------------------------------------------ how many, between layers

    def to_drop(self, weights: Sequence[Weight], wanted: Sequence[int]) -> list[int]:
        """Return how many connections each layer loses to all: those ``wanted``, but not more than there is room for.

        A layer keeps what ``min_layer_density`` asks for, counting the places it has free. A dense one may lose some.
        """
        loss = [min(n, w.size - self.least(w)) for w, n in zip(weights, wanted, strict=True)]
        return apportion(min(sum(loss), sum(w.room for w in weights)), loss, loss)

    def needed(self, weights: Sequence[Weight], dropped: Sequence[int]) -> list[int]:
        """Return how many connections each layer must get back, having lost ``dropped``, for ``min_layer_density``."""
        return [max(0, self.least(w) - (w.active - n)) for w, n in zip(weights, dropped, strict=True)]

    def to_grow(self, weights: Sequence[Weight], dropped: Sequence[int], claims: Sequence[float]) -> list[int]:
        """Divide what was ``dropped`` among the layers in proportion to their ``claims``, as far as they have room."""
        needed = self.needed(weights, dropped)
        room = [weight.room - n for weight, n in zip(weights, needed, strict=True)]
        more = apportion(sum(dropped) - sum(needed), claims, room)
        return [n + extra for n, extra in zip(needed, more, strict=True)]
