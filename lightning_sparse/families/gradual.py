"""GradualPruning: the base of methods whose number of connections falls, by a cubic schedule, to the target."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException, rank_zero_info
from lightning_sparse.compat.options import option
from lightning_sparse.families import magnitude, starts
from lightning_sparse.families.common import FINAL_SPARSITY, PRUNING_SCOPE, Interval, check_interval
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.shares import floors
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import Scope, budget
from lightning_sparse.rules.clock import FEW, UPDATES, Clock, interval, spoken
from lightning_sparse.rules.schedules import cubic
from lightning_sparse.trainer.guards import REMEDY, listed, refuse_unknown_length
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["GradualPruning"]


class GradualPruning(DenseOnly, MaskedCallback):
    """A number of connections that falls from step to step of a schedule, by magnitude, and ends at the target exactly.

    The sparsity of step t is ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3`` (Zhu & Gupta 2017, Eq. 1). The
    last update falls on the end of the schedule even if the interval does not divide it. If the training becomes
    shorter than planned, so that the end lies behind, the next step prunes to the target. The weights of each optimizer
    follow the schedule by themselves.
    """

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=f"s_f, {FINAL_SPARSITY}")
    initial_sparsity: float = option(
        default=0.0,
        check=partial(checks.fraction, "0 starts dense."),
        doc='share of zeros at the start, s_i, from 0 to ``sparsity``; with ``initial="zeros"`` or a file of masks, '
        "what there is counts instead.",
    )
    begin_at: float = option(
        default=0.0,
        check=partial(checks.fraction, "0 prunes from the start."),
        doc="share of the training after which pruning begins (t_0), in [0, 1).",
    )
    end_at: float = option(
        default=0.75,
        check=partial(checks.fraction, "0.75 leaves a quarter of the training to recover."),
        doc="share of the training after which the target is reached (t_1), above ``begin_at`` and at most 1.",
    )
    update_every: Interval = option(
        default="auto",
        check=check_interval,
        doc='number of optimizer steps from update to update; ``"auto"``: the paper\'s interval, or a shorter one with '
        f"which the schedule has {UPDATES} updates.",
    )

    scope: Scope = option(default="global", doc=PRUNING_SCOPE)

    #: the paper's interval, in optimizer steps
    paper_update_every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Check what the options are together."""
        super().__post_init__()
        if self.initial_sparsity > self.sparsity_target:
            raise ValueError(
                f"initial_sparsity must be at most sparsity={self.sparsity_target!r}, got {self.initial_sparsity!r}: "
                "connections are pruned, not added. Lower it; 0 starts dense."
            )
        if not self.initial_sparsity and self.initial in ("magnitude", "global_magnitude"):
            raise ValueError(
                f"initial_sparsity must be above 0 with initial={self.initial!r}, got {self.initial_sparsity!r}, which "
                "starts dense whatever initial says. Give the share of zeros at the start, or leave initial out."
            )
        if self.begin_at >= self.end_at:
            raise ValueError(
                f"begin_at must be below end_at={self.end_at!r}, got {self.begin_at!r}. 0 prunes from the start."
            )

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that the schedule has a length and an end that can be reached."""
        super().on_train_start(trainer, pl_module)
        refuse_unknown_length(self, self.total_steps, f"of which it prunes in the first {self.end_at:.0%}")
        for group in self._groups:
            floors(self.units(group.weights), self.min_layer_density, self.final(group))
        ticks = [tick for tick in self.clock.ticks(int(self.total_steps) - 1) if tick <= self.span()[1]]
        rank_zero_info(
            f"{self!r} prunes {spoken(ticks, self.every)}, to density {1 - self.sparsity_target:.4g} in all."
        )
        if len(ticks) < FEW:
            self.warn_once(
                f"{self!r} will prune {'all at once' if len(ticks) == 1 else f'only {len(ticks)} times'}: begin_at and "
                f"end_at are {ticks[-1] - self.span()[0]} steps apart. Lower update_every, or train longer."
            )

    def span(self) -> tuple[int, int]:
        """Return the first and the last step of the schedule, the latter one of the training's."""
        last = min(math.ceil(self.end_at * self.total_steps), int(self.total_steps) - 1)
        return min(int(self.begin_at * self.total_steps), last), last

    @property
    def clock(self) -> Clock:
        """When connections are pruned: every so many steps of the schedule, and at its last."""
        first, last = self.span()
        return Clock(self.every, begin=first, end=last, closing=last)

    @property
    def every(self) -> int:
        """Number of optimizer steps from update to update."""
        first, last = self.span()
        return interval(self.paper_update_every, last - first) if self.update_every == "auto" else self.update_every

    def is_due(self, group: WeightGroup) -> bool:
        """Tell whether the clock says so, or the schedule is over without its target: the training became shorter."""
        clock = self.clock
        over = clock.closing is not None and group.step > clock.closing
        return clock.is_due(group.step) or (over and group.values.get("asked") != self.final(group))

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Let the newcomers, which start with ``initial_sparsity``, join at the present point of the schedule."""
        super().attach_added(choices, optimizer)
        group = self._groups.of(optimizer)
        group.due = True
        new = sum(weight.num_active for weight in self.units([self._weights[choice.name] for choice in choices]))
        group.values |= {key: group.values[key] + new for key in ("start", "asked") if key in group.values}

    # ------------------------------------------------------------------ how many

    @property
    def planned_density(self) -> dict[str, float]:
        """The density that each layer ends with, unless they compete."""
        return magnitude.planned_density(self)

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Choose the masks of each optimizer's weights by themselves, as their schedule will go on."""
        found = starts.start(self.initial).knows_number
        for group in self._groups if self.initial_sparsity or found else ():
            own = [weight for weight in weights if weight in group.weights]
            if own:
                starts.begin(self, own, self.initial_sparsity)
                self._refuse_too_sparse(own)

    def refuse_number(self, weights: Sequence[Weight]) -> None:
        """Raise unless there are zeros, if they are to be kept, and each layer has its least density."""
        starts.refuse_found(self, weights)
        if self.pattern.density == 1:  # or it may come about on the way
            starts.refuse_other_pattern(self, weights)

    def _refuse_too_sparse(self, weights: Sequence[Weight]) -> None:
        """Raise if there are fewer connections than the schedule ends with."""
        weights = self.units(weights)
        active, final = sum(w.num_active for w in weights), budget(self.sparsity_target, sum(w.size for w in weights))
        if active < final:
            raise MisconfigurationException(
                f"{self!r} prunes to {final} connections, but begins with {active}: they are pruned, not added. Give a "
                f"sparsity of {1 - active / sum(w.size for w in weights):.6g} or more."
            )

    def final(self, group: WeightGroup) -> int:
        """Return the number of connections, or of units of the pattern, at the end of the schedule."""
        return budget(self.sparsity_target, self.num_units(group))

    def plan(self, group: WeightGroup) -> None:
        """Note the number of connections that the schedule leaves now, and at the first move where it began."""
        first, last = self.span()
        final = self.final(group)
        start = group.values.setdefault("start", self.num_active(group))
        progress = (group.step - first) / (last - first) if last > first else 1.0
        now = final + round((start - final) * cubic(progress))
        group.values["asked"] = min(now, group.values.get("asked", start))  # a run may be resumed with more epochs

    def target_count(self, group: WeightGroup) -> int:
        """Return the number of connections that the plan leaves now."""
        return int(group.values["asked"])

    def prune(self, group: WeightGroup) -> None:
        """Keep as many of the largest ``|W|`` as the schedule says; see ``magnitude.prune``."""
        total, final = self.target_count(group), self.final(group)
        weights = self.units(group.weights)
        magnitude.prune(weights, self.pattern, total, final, self.scope, self.distribution, self.min_layer_density)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before its schedule."""
        super().on_train_end(trainer, pl_module)
        for group in self._groups:
            if self.num_active(group) <= self.final(group):
                continue
            counts = f"{self!r} has {self.num_active(group)} active weights, not {self.final(group)}:"
            if group.halted_by:
                self.warn_once(f"{counts} gradients of {listed(group.halted_by)} were not finite. {REMEDY}")
            else:
                self.warn_once(
                    f"{counts} the training ended after {group.step} steps of {self.total_steps:.0f} planned, before "
                    "the schedule did. Set max_epochs or max_steps to what is really trained."
                )
