"""GradualPruning: the base of methods whose number of connections falls, by a cubic schedule, to the target."""

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.families import magnitude
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import Scope, budget, floors
from lightning_sparse.rules.schedules import cubic
from lightning_sparse.weights.base import Pool, Weight

__all__ = ["GradualPruning"]


class GradualPruning(MaskedCallback):
    """A number of connections that falls from step to step of a schedule, by magnitude, and ends at the target exactly.

    The sparsity of step t is ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3`` (Zhu & Gupta 2017, Eq. 1). The
    last update falls on the end of the schedule even if the interval does not divide it. The weights of each optimizer
    follow the schedule by themselves.

    Args:
        sparsity: share of zeros at the end, the formula's s_f, in [0, 1).
        initial_sparsity: share of zeros at the start, s_i, from 0 to ``sparsity``; a random mask if above 0.
        begin_at: share of the training after which pruning begins, in [0, 1).
        end_at: share of the training after which the target is reached, above ``begin_at`` and at most 1.
        update_every: number of optimizer steps from update to update.
        options: see ``MaskedCallback``.
    """

    def __init__(
        self,
        sparsity: float,
        initial_sparsity: float,
        begin_at: float,
        end_at: float,
        update_every: int,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, **options)
        checks.fraction("0 starts dense.", initial_sparsity=initial_sparsity)
        checks.fraction("0 prunes from the start.", begin_at=begin_at)
        checks.fraction("0.75 leaves a quarter of the training to recover.", end_at=end_at)
        checks.integer(1, "The papers' values are 100 to 4000.", update_every=update_every)
        if initial_sparsity > sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity={sparsity!r}, got {initial_sparsity!r}: connections are "
                "pruned, not added. Lower it; 0 starts dense."
            )
        if begin_at >= end_at:
            raise ValueError(f"begin_at must be below end_at={end_at!r}, got {begin_at!r}. 0 prunes from the start.")
        self.initial_sparsity = initial_sparsity
        self.begin_at = begin_at
        self.end_at = end_at
        self.update_every = update_every

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that the schedule has a length and an end that can be reached."""
        super().on_train_start(trainer, pl_module)
        self._require_length(f"of which it prunes in the first {self.end_at:.0%}")
        for pool in self._pools.values():
            floors(self.min_layer_density, [weight.size for weight in pool.weights], self.final(pool))
        first, last = self.span()
        if last - first <= self.update_every:
            self._warn_once(
                f"{type(self).__name__} will prune all at once: the {last - first} steps from begin_at to end_at hold "
                f"no second update. Lower update_every, or train longer."
            )

    def span(self) -> tuple[int, int]:
        """Return the first and the last step of the schedule, the latter one of the training's."""
        last = min(math.ceil(self.end_at * self.total_steps), int(self.total_steps) - 1)
        return min(int(self.begin_at * self.total_steps), last), last

    def is_due(self, pool: Pool) -> bool:
        """Tell whether this step is one of every ``update_every`` of the schedule, or its last."""
        first, last = self.span()
        return pool.step == last or (first < pool.step < last and (pool.step - first) % self.update_every == 0)

    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Let the newcomers, which start with ``initial_sparsity``, join at the present point of the schedule."""
        super().attach_more(choices, optimizer)
        pool = self._pools[id(optimizer)]
        pool.due = True
        new = sum(self._weights[choice.name].active for choice in choices)
        pool.values |= {key: pool.values[key] + new for key in ("start", "asked") if key in pool.values}

    # ------------------------------------------------------------------ how many

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Draw the masks of each optimizer's weights by themselves, as their schedule will go on."""
        for pool in self._pools.values() if self.initial_sparsity else ():
            own = [weight for weight in weights if weight in pool.weights]
            if own:
                super().initial_masks(own)

    def final(self, pool: Pool) -> int:
        """Return the number of connections at the end of the schedule."""
        return budget(self.sparsity_target, sum(weight.size for weight in pool.weights))

    def asked(self, pool: Pool) -> int:
        """Return the number of connections that the schedule leaves now."""
        first, last = self.span()
        final = self.final(pool)
        start = pool.values.setdefault("start", sum(weight.active for weight in pool.weights))
        progress = (pool.step - first) / (last - first) if last > first else 1.0
        now = final + round((start - final) * cubic(progress))
        pool.values["asked"] = min(now, pool.values.get("asked", start))  # a run may be resumed with more epochs
        return int(pool.values["asked"])

    def prune(self, pool: Pool, scope: Scope = "global") -> None:
        """Keep as many of the largest ``|W|`` as the schedule says; see ``magnitude.prune``."""
        total, final = self.asked(pool), self.final(pool)
        magnitude.prune(pool.weights, total, final, scope, self.distribution, self.min_layer_density)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before its schedule."""
        for pool in self._pools.values():
            active = sum(weight.active for weight in pool.weights)
            if active > self.final(pool):
                self._warn_once(
                    f"{type(self).__name__} has {active} active weights, not {self.final(pool)}: the training ended "
                    f"after {pool.step} steps of {self.total_steps:.0f} planned, before the schedule did. Set "
                    "max_epochs or max_steps to what is really trained."
                )
