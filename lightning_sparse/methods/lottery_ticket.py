"""LotteryTicket: iterative magnitude pruning with rewinding (Frankle & Carbin, ICLR 2019; Frankle et al., ICML 2020).

Decisions: one fit holds all trainings of the iteration, of equal length; each pruning leaves the same share of the
weights that are left, and the last one the target exactly; all layers compete by default, as in the second paper.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import (
    LightningModule,
    MisconfigurationException,
    StochasticWeightAveraging,
    Trainer,
    rank_zero_info,
)
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families import magnitude
from lightning_sparse.families.before_training import budgets
from lightning_sparse.families.common import FINAL_SPARSITY, PRUNING_SCOPE
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import Distribution, Scope, budget, floors
from lightning_sparse.trainer.rewind import restore, snapshot
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import dense, keep_zero_state

__all__ = ["LotteryTicket"]


class LotteryTicket(DenseOnly, MaskedCallback):
    """Lottery tickets: train, prune the smallest weights, rewind the others, and so on; then train what is left.

    The epochs of the fit are divided into ``rounds + 1`` trainings of equal length. After each but the last, weights
    are pruned by magnitude, down to ``size (1 - sparsity)^(j / rounds)`` in round j. Then all parameters and buffers of
    the module, optimizers and learning-rate schedulers go back to where they were when the fit began (or after
    ``rewind_epoch`` epochs), so each training runs like the first, with fewer weights.

    Raises:
        MisconfigurationException: at fit start, if the epochs cannot be divided into the trainings.

    Example:
        >>> from lightning_sparse import LotteryTicket
        >>> callback = LotteryTicket(sparsity=0.9, rounds=4)  # with Trainer(max_epochs=100): 5 trainings of 20

    Reference:
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019.
    """

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=FINAL_SPARSITY)
    initial: str = fixed(default="random")  # it begins dense
    rounds: int = option(
        default=5,
        check=partial(checks.integer, 1, "1 prunes once."),
        doc="number of prunings, at least 1, which is one-shot pruning.",
    )
    rewind_epoch: int = option(
        default=0,
        check=partial(checks.integer, 0, "0 rewinds to the start."),
        doc="number of epochs after which the state to rewind to is taken. Later trainings repeat only the epochs from "
        "there on, so with L epochs a training, the fit has ``L + rounds (L - rewind_epoch)``.",
    )
    scope: Scope = option(default="global", doc=PRUNING_SCOPE)
    distribution: Distribution | Mapping[str, float] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._epochs: int | None = None
        self._pruned = 0  # rounds
        self._earlier = 0  # those of earlier fits
        self._rewind_point: dict[str, Any] = {}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """The number of prunings so far, to log."""
        return {"sparsity/round": float(self._pruned)}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The state to rewind to, too."""
        return [*super().state_tensors, self._rewind_point]

    # ------------------------------------------------------------------ when

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Note how long the fit is."""
        super().begin_epoch(epoch, epochs)
        self._epochs = epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the epochs make up the trainings, and the budget the floors."""
        super().on_train_start(trainer, pl_module)
        self._refuse_early_average(trainer, max(self.starts(), default=-1))
        for group in self._groups:
            sizes = [weight.size for weight in group.weights]
            floors(self.min_layer_density, sizes, self.count(group.weights, self.rounds))

    def _refuse_early_average(self, trainer: Trainer, last: int) -> None:
        """Raise if weights are averaged, and learning rates exchanged, before the last rewinding."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, StochasticWeightAveraging) and other.swa_start <= last:
                raise MisconfigurationException(
                    f"{self!r} rewinds weights and learning rates in epoch {last} for the last time, and "
                    "StochasticWeightAveraging must not begin before the one after, but it does in epoch "
                    f"{other.swa_start} (both counted from 0). Give it swa_epoch_start={last + 2} or more."
                )

    def starts(self) -> list[int]:
        """Return the epochs in which the trainings of this fit begin, but for the first."""
        rounds, r = self.rounds - self._earlier, self.rewind_epoch
        if rounds == 0:
            return []
        if self._epochs is None:
            raise MisconfigurationException(
                f"{self!r} divides the epochs of the fit into {rounds + 1} trainings: give the Trainer max_epochs."
            )
        length, rest = divmod(self._epochs + rounds * r, rounds + 1)
        if rest or length <= r:
            length = max(length, r + 1)
            good = [(rounds + 1) * n - rounds * r for n in (length, length + 1)]
            raise MisconfigurationException(
                f"The fit's {self._epochs} epochs cannot be divided into {rounds + 1} trainings of equal length "
                f"(rounds={self.rounds}, rewind_epoch={r}). Set max_epochs to {good[0]} or {good[1]}, or change rounds."
            )
        return [length + j * (length - r) for j in range(rounds)]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state to rewind to; between two trainings prune and rewind, when the schedulers have stepped."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = trainer.current_epoch
        if epoch == self.rewind_epoch and not self._rewind_point:
            self._rewind_point = snapshot(trainer, pl_module)
        if self._earlier + sum(start <= epoch for start in self.starts()) > self._pruned:
            self._pruned += 1
            for group in self._groups:
                self._prune(group.weights)
            self._rewind(trainer, pl_module)
            rank_zero_info(f"{self!r}: round {self._pruned} of {self.rounds} leaves density {self.density:.4g}.")

    # ------------------------------------------------------------------ prune and rewind

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin dense, as all weights are."""

    def count(self, weights: Sequence[Weight], rounds: int) -> int:
        """Return the number of connections that so many rounds leave to ``weights``."""
        size = sum(weight.size for weight in weights)
        return [size, *budgets(size, budget(self.sparsity_target, size), self.rounds)][rounds]

    @torch.no_grad()
    def _prune(self, weights: Sequence[Weight]) -> None:
        """Keep the largest ``|W|``, as many as the rounds so far leave."""
        total, final = (self.count(weights, rounds) for rounds in (self._pruned, self.rounds))
        magnitude.prune(weights, total, final, self.scope, self.distribution, self.min_layer_density)

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
            self._pruned = self._pruned if self.density < 1 else 0
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
            "rewind_point": self._rewind_point,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._pruned, self._earlier = state_dict["pruned"], state_dict["earlier"]
        self._rewind_point = state_dict["rewind_point"]
