"""Rounds: a fit that is divided into trainings of equal length; between two of them weights go, and the others go back.

The trainings are counted from the start of the fit, in optimizer steps, or in epochs where the data are endless.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from lightning_sparse.compat.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    rank_zero_info,
)
from lightning_sparse.rules.trainings import Trainings, gentle_rounds, good_totals, settled
from lightning_sparse.trainer.fit import epochs
from lightning_sparse.trainer.horizon import horizon
from lightning_sparse.trainer.rewind import restore, snapshot
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import dense, keep_zero_state

__all__ = ["Rounds"]


class _Method(Protocol):
    """What rounds ask of their method."""

    rounds: int | None
    rewind_step: int
    sparsity_target: float
    _before_fit: dict[str, int]

    @property
    def total_steps(self) -> float: ...

    def warn_once(self, message: str) -> None: ...


class Rounds:
    """The rounds of one method: how many are over, and the state to go back to.

    Args:
        method: whose ``rounds`` and ``rewind_step`` divide the fit.

    Attributes:
        over: number of rounds so far.
        earlier: those of earlier fits.
        total: in all; 0 until a fit has settled them.
        point: the state to rewind to; empty until it is taken.
        trainings: of this fit.
    """

    trainings: Trainings

    def __init__(self, method: _Method) -> None:
        self.method = method
        self.over = self.earlier = 0
        self.total = method.rounds or 0
        self.point: dict[str, Any] = {}

    # ------------------------------------------------------------------ a fit begins

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Make sure that the fit makes up the trainings; warn of learning-rate schedules that do not fit them.

        Raises:
            MisconfigurationException: it cannot be divided, or weights are averaged before the last rewinding.
        """
        batches = trainer.num_training_batches
        self._endless = math.isinf(batches)
        self._epoch_steps = 1 if self._endless else math.ceil(batches / trainer.accumulate_grad_batches)
        self.trainings = self._divide(trainer)
        self.total = self.earlier + self.trainings.rounds
        self._refuse_early_average(trainer)
        self._warn_of_long_schedules(trainer, module)

    def go_on(self, fresh: bool) -> None:
        """Let another fit begin: with the rounds that are left, or ``fresh`` with all of them."""
        if fresh:
            self.over, self.total = 0, self.method.rounds or 0
        self.earlier, self.point = self.over, {}

    def _divide(self, trainer: Trainer) -> Trainings:
        """Divide this fit into its trainings: in steps; in epochs, which then count as one step, if data are endless.

        Raises:
            MisconfigurationException: it cannot be divided.
        """
        if self.total and self.total == self.earlier:
            return Trainings(0, 0, 1)
        method, rewind_step = self.method, self.method.rewind_step
        total = (epochs(trainer) or math.inf) - method._before_fit["epochs"] if self._endless else method.total_steps
        if math.isinf(total) or (self._endless and rewind_step):
            raise MisconfigurationException(
                f"{method!r} divides the fit into trainings of equal length: give the Trainer max_epochs, and "
                "limit_train_batches if the data have no known length, but rewind_step counts its steps."
            )
        left, gentle = self.total - self.earlier, gentle_rounds(method.sparsity_target)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # '"Trainer" has no attribute'
            return self._few(int(total), left if self.total else gentle)
        choices = range(left, left + 1) if self.total else range(1, gentle + 1)
        trainings = settled(int(total), rewind_step, choices, self._epoch_steps)
        if trainings is None:
            raise MisconfigurationException(self._indivisible(int(total), choices))
        return trainings

    def _few(self, total: int, rounds: int) -> Trainings:
        """Return trainings of the few steps of ``fast_dev_run``: as many rounds as there can be, maybe none."""
        rewind_step = self.method.rewind_step
        steps = total - rewind_step
        rounds = max(0, min(rounds, steps - 1))
        length = max(steps, 1) // (rounds + 1)
        rank_zero_info(f"{self.method!r}: fast_dev_run makes {rounds} rounds, each after {length} steps.")
        return Trainings(rounds, rewind_step, length)

    def _indivisible(self, total: int, rounds: range) -> str:
        """Say which lengths of the fit can be divided."""
        method, rewind_step = self.method, self.method.rewind_step
        unit, name = (1, "steps") if rewind_step % self._epoch_steps else (self._epoch_steps, "epochs")
        near = good_totals(total, rewind_step, rounds, self._epoch_steps)
        pieces = f"{rounds[0] + 1}" if len(rounds) == 1 else f"{rounds[0] + 1} to {rounds[-1] + 1}"
        return (
            f"The fit's {total / unit:g} {name} cannot be divided into {pieces} trainings of equal length, of whole "
            f"epochs each (rounds={method.rounds}, rewind_step={rewind_step}). "
            f"Set max_{name} to {' or '.join(f'{good // unit}' for good in near)}, or change rounds."
        )

    def _refuse_early_average(self, trainer: Trainer) -> None:
        """Raise if weights are averaged, and learning rates exchanged, before the last rewinding."""
        last = self.method._before_fit["epochs"] + self.trainings.last // self._epoch_steps
        for other in trainer.callbacks if self.trainings.rounds else ():  # type: ignore[attr-defined]
            if is_a(other, "StochasticWeightAveraging") and other.swa_start <= last:
                raise MisconfigurationException(
                    f"{self.method!r} rewinds weights and learning rates in epoch {last} for the last time, and "
                    "StochasticWeightAveraging must not begin before the one after, but it does in epoch "
                    f"{other.swa_start} (both counted from 0). Give it swa_epoch_start={last + 2} or more."
                )

    def _warn_of_long_schedules(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn of learning-rate schedules that are longer than a training, with which they begin anew."""
        for config in trainer.lr_scheduler_configs if module.automatic_optimization and self.trainings.rounds else ():
            move = config.frequency * (1 if config.interval == "step" else self._epoch_steps)
            training, fit = self.trainings.first / move, self.trainings.total // move
            end = horizon(config.scheduler, max(fit, 1))
            if end is not None and end > 1.05 * training:
                self.method.warn_once(
                    f"{self.method!r}: the learning-rate schedule {type(config.scheduler).__name__} ends after {end:g} "
                    f"{config.interval}s, a training after {training:g}: it begins anew with each training and never "
                    "reaches its end. Make it as long as one training."
                )

    # ------------------------------------------------------------------ between two trainings

    def end_of_training(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> bool:
        """Tell whether a training, but not the last one, is over before this batch: then a round more is.

        Before that, take the state to rewind to, if it is time.
        """
        step = min(batch_idx // trainer.accumulate_grad_batches, self._epoch_steps - 1)
        position = (trainer.current_epoch - self.method._before_fit["epochs"]) * self._epoch_steps + step
        if position >= self.method.rewind_step and not self.point:
            self.point = snapshot(trainer, module)
        ended = self.earlier + self.trainings.behind(position) > self.over
        self.over += ended
        return ended

    @torch.no_grad()
    def rewind(self, trainer: Trainer, module: LightningModule, weights: Sequence[Weight]) -> None:
        """Bring back the state that was taken, but for what is pruned of the ``weights``."""
        restore(self.point, trainer, module)
        for weight in dense(weights):
            weight.keep_zeros()
            keep_zero_state(weight)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds and the state to rewind to."""
        return {"pruned": self.over, "earlier": self.earlier, "rounds": self.total, "rewind_point": self.point}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            MisconfigurationException: it was written with another number of rounds.
        """
        if self.method.rounds not in (None, state["rounds"]) and state["rounds"]:
            raise MisconfigurationException(
                f"The checkpoint was written by a fit of {state['rounds']} rounds, this {self.method!r} has "
                f"rounds={self.method.rounds}: give it the same, or leave rounds out."
            )
        self.over, self.earlier, self.total = (state[key] for key in ("pruned", "earlier", "rounds"))
        self.point = state["rewind_point"]
