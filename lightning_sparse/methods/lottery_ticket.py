"""LotteryTicket: iterative magnitude pruning with rewinding (Frankle & Carbin, ICLR 2019; Frankle et al., ICML 2020).

Decisions: one fit holds all trainings of the iteration, of equal length; each pruning leaves the same share of the
weights that are left, and the last one the target exactly; all layers compete by default, as in the second paper; a
point to rewind to lies at the same place of an epoch as the prunings do, so all trainings see the same part of it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    rank_zero_info,
)
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families import magnitude
from lightning_sparse.families.before_training import budgets
from lightning_sparse.families.common import FINAL_SPARSITY, PRUNING_SCOPE
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.shares import floors
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import Distribution, Scope, budget
from lightning_sparse.rules.trainings import Trainings, gentle_rounds, good_totals, settled
from lightning_sparse.trainer.agreement import refuse_broken_clock
from lightning_sparse.trainer.fit import epochs
from lightning_sparse.trainer.guards import refuse_older_state, warn_of_equal_scores
from lightning_sparse.trainer.horizon import horizon
from lightning_sparse.trainer.rewind import restore, snapshot
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import dense, keep_zero_state

__all__ = ["LotteryTicket"]


class LotteryTicket(DenseOnly, MaskedCallback):
    """Lottery tickets: train, prune the smallest weights, rewind the others, repeat; at last train the rest.

    The fit is divided into ``rounds + 1`` trainings of equal length. After each but the last, weights are pruned by
    magnitude, down to ``size (1 - sparsity)^(j / rounds)`` in round j. Then all parameters and buffers of the module,
    optimizers and learning-rate schedulers get back the state that they had when the fit began (or after
    ``rewind_step`` steps), so each training runs like the first, with fewer weights.

    Raises:
        MisconfigurationException: at fit start, if the fit cannot be divided into the trainings.

    Example:
        >>> from lightning_sparse import LotteryTicket
        >>> callback = LotteryTicket(sparsity=0.9, rounds=4)  # with Trainer(max_epochs=100): 5 trainings of 20

    Reference:
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019.
    """

    takes_tensor_parallel = False

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=FINAL_SPARSITY)
    initial: str = fixed(default="random")  # it begins dense
    scale_init: bool = fixed(default=False)
    rounds: int | None = option(
        default=None,
        check=partial(checks.integer, 1, "1 prunes once."),
        doc="number of prunings, at least 1, which is one-shot pruning. Default: so many that each prunes about 20 %, "
        "which is 10 for 0.9, or fewer: the most that divide the fit into trainings of at least five epochs.",
    )
    rewind_step: int = option(
        default=0,
        check=partial(checks.integer, 0, "0 rewinds to the start."),
        doc="number of optimizer steps after which the state to rewind to is taken. From there on each training takes "
        "the same number of whole epochs, so the fit has ``rewind_step`` steps and ``(rounds + 1)`` times these.",
    )
    scope: Scope = option(default="global", doc=PRUNING_SCOPE)
    distribution: Distribution | Mapping[str, float] = "uniform"

    must_stay = ("pattern", "rewind_step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pruned = 0  # rounds
        self._earlier = 0  # those of earlier fits
        self._rounds = self.rounds or 0  # in all; 0 until a fit has settled them
        self._rewind_point: dict[str, Any] = {}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """The number of prunings so far, to log."""
        return {"sparsity/round": float(self._pruned)}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The state to rewind to, too."""
        return [*super().state_tensors, self._rewind_point]

    @property
    def planned_density(self) -> dict[str, float]:
        """None: the layers begin dense."""
        return {}

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the fit makes up the trainings, and the budget the floors."""
        super().on_train_start(trainer, pl_module)
        batches = trainer.num_training_batches
        self._endless = math.isinf(batches)
        self._epoch_steps = 1 if self._endless else math.ceil(batches / trainer.accumulate_grad_batches)
        self._trainings = self._divide(trainer)
        self._rounds = self._earlier + self._trainings.rounds
        self._refuse_early_average(trainer)
        self._warn_of_long_schedules(trainer, pl_module)
        for group in self._groups:
            weights = self.units(group.weights)
            floors(weights, self.min_layer_density, self.count(weights, self._rounds))

    def _divide(self, trainer: Trainer) -> Trainings:
        """Divide this fit into its trainings: in steps; in epochs, which then count as one step, if data are endless.

        Raises:
            MisconfigurationException: it cannot be divided.
        """
        if self._rounds and self._rounds == self._earlier:
            return Trainings(0, 0, 1)
        total = (epochs(trainer) or math.inf) - self._before_fit["epochs"] if self._endless else self.total_steps
        if math.isinf(total) or (self._endless and self.rewind_step):
            raise MisconfigurationException(
                f"{self!r} divides the fit into trainings of equal length: give the Trainer max_epochs, and "
                "limit_train_batches if the data have no known length, but rewind_step counts its steps."
            )
        left = self._rounds - self._earlier
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # '"Trainer" has no attribute'
            return self._few(int(total), left if self._rounds else gentle_rounds(self.sparsity_target))
        choices = range(left, left + 1) if self._rounds else range(1, gentle_rounds(self.sparsity_target) + 1)
        trainings = settled(int(total), self.rewind_step, choices, self._epoch_steps)
        if trainings is None:
            raise MisconfigurationException(self._indivisible(int(total), choices))
        return trainings

    def _few(self, total: int, rounds: int) -> Trainings:
        """Return trainings of the few steps of ``fast_dev_run``: as many rounds as there can be, maybe none."""
        steps = total - self.rewind_step
        rounds = max(0, min(rounds, steps - 1))
        rank_zero_info(
            f"{self!r}: fast_dev_run makes {rounds} rounds, each after {max(steps, 1) // (rounds + 1)} steps."
        )
        return Trainings(rounds, self.rewind_step, max(steps, 1) // (rounds + 1))

    def _indivisible(self, total: int, rounds: range) -> str:
        """Say which lengths of the fit can be divided."""
        unit, name = (1, "steps") if self.rewind_step % self._epoch_steps else (self._epoch_steps, "epochs")
        near = good_totals(total, self.rewind_step, rounds, self._epoch_steps)
        pieces = f"{rounds[0] + 1}" if len(rounds) == 1 else f"{rounds[0] + 1} to {rounds[-1] + 1}"
        return (
            f"The fit's {total / unit:g} {name} cannot be divided into {pieces} trainings of equal length, of whole "
            f"epochs each (rounds={self.rounds}, rewind_step={self.rewind_step}). "
            f"Set max_{name} to {' or '.join(f'{good // unit}' for good in near)}, or change rounds."
        )

    def _refuse_early_average(self, trainer: Trainer) -> None:
        """Raise if weights are averaged, and learning rates exchanged, before the last rewinding."""
        last = self._before_fit["epochs"] + self._trainings.last // self._epoch_steps
        for other in trainer.callbacks if self._trainings.rounds else ():  # type: ignore[attr-defined]
            if is_a(other, "StochasticWeightAveraging") and other.swa_start <= last:
                raise MisconfigurationException(
                    f"{self!r} rewinds weights and learning rates in epoch {last} for the last time, and "
                    "StochasticWeightAveraging must not begin before the one after, but it does in epoch "
                    f"{other.swa_start} (both counted from 0). Give it swa_epoch_start={last + 2} or more."
                )

    def _warn_of_long_schedules(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn of learning-rate schedules that are longer than a training, with which they begin anew."""
        for config in trainer.lr_scheduler_configs if module.automatic_optimization and self._trainings.rounds else ():
            move = config.frequency * (1 if config.interval == "step" else self._epoch_steps)
            training, fit = self._trainings.first / move, self._trainings.total // move
            end = horizon(config.scheduler, max(fit, 1))
            if end is not None and end > 1.05 * training:
                self.warn_once(
                    f"{self!r}: the learning-rate schedule {type(config.scheduler).__name__} ends after {end:g} "
                    f"{config.interval}s, a training after {training:g}: it begins anew with each training and never "
                    "reaches its end. Make it as long as one training."
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back if it is time; the schedulers have stepped."""
        super().on_train_epoch_start(trainer, pl_module)
        self._go_on(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go back if it is time within an epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._go_on(trainer, pl_module, batch_idx)

    def _go_on(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Take the state to rewind to; between two trainings prune and rewind."""
        step = min(batch_idx // trainer.accumulate_grad_batches, self._epoch_steps - 1)
        position = (trainer.current_epoch - self._before_fit["epochs"]) * self._epoch_steps + step
        if position >= self.rewind_step and not self._rewind_point:
            self._rewind_point = snapshot(trainer, module)
        if self._earlier + self._trainings.behind(position) > self._pruned:
            self._pruned += 1
            for group in self._groups:
                self._prune(group.weights)
            self._rewind(trainer, module)
            rank_zero_info(f"{self!r}: round {self._pruned} of {self._rounds} leaves density {self.density:.4g}.")

    # ------------------------------------------------------------------ prune and rewind

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin dense, as all weights are."""

    def count(self, weights: Sequence[Weight], rounds: int) -> int:
        """Return the number of connections that so many rounds leave to ``weights``."""
        size = sum(weight.size for weight in weights)
        return [size, *budgets(size, budget(self.sparsity_target, size), self._rounds)][rounds]

    @torch.no_grad()
    def _prune(self, weights: Sequence[Weight]) -> None:
        """Keep the largest ``|W|``, as many as the rounds so far leave."""
        warn_of_equal_scores(self, [weight.name for weight in weights if weight.alike])
        weights = self.units(weights)
        total, final = (self.count(weights, rounds) for rounds in (self._pruned, self._rounds))
        magnitude.prune(weights, self.pattern, total, final, self.scope, self.distribution, self.min_layer_density)

    @torch.no_grad()
    def _rewind(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the state that was taken, but for what is pruned."""
        restore(self._rewind_point, trainer, pl_module)
        for weight in dense([*self._weights.values()]):
            weight.keep_zeros()
            keep_zero_state(weight)

    # ------------------------------------------------------------------ the family's verbs and state

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over; another fit goes on with the rounds that are left."""
        super().attach(choices, optimizers, resumed)
        if not resumed:
            if self.density == 1:
                self._pruned, self._rounds = 0, self.rounds or 0
            self._earlier, self._rewind_point = self._pruned, {}

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Prune newcomers at once as far as the others are."""
        super().attach_added(choices, optimizer)
        self._prune([self._weights[choice.name] for choice in choices])

    def state_dict(self) -> dict[str, Any]:
        """Return masks, rounds and the state to rewind to."""
        return {
            **super().state_dict(),
            "pruned": self._pruned,
            "earlier": self._earlier,
            "rounds": self._rounds,
            "rewind_point": self._rewind_point,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        refuse_older_state(self, "rounds" in state_dict)
        super().load_state_dict(state_dict)
        refuse_broken_clock(self, state_dict, ("pruned", "earlier", "rounds"))
        if self.rounds not in (None, state_dict["rounds"]) and state_dict["rounds"]:
            raise MisconfigurationException(
                f"The checkpoint was written by a fit of {state_dict['rounds']} rounds, this {self!r} has "
                f"rounds={self.rounds}: give it the same, or leave rounds out."
            )
        self._pruned, self._earlier, self._rounds = (state_dict[key] for key in ("pruned", "earlier", "rounds"))
        self._rewind_point = state_dict["rewind_point"]

    def divided_state(self, trainer: Trainer) -> dict[str, Any]:
        """Return the state with a point to rewind to, of now, of which that of a checkpoint has the parts."""
        return {**super().divided_state(trainer), "rewind_point": snapshot(trainer, trainer.lightning_module)}
