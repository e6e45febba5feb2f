"""LotteryTicket: iterative magnitude pruning with rewinding (Frankle & Carbin, ICLR 2019; Frankle et al., ICML 2020).

Decisions: one fit holds all trainings of the iteration, of equal length; each pruning leaves the same share of the
weights that are left, and the last one the target exactly; all layers compete by default, as in the second paper; a
point to rewind to lies at the same place of an epoch as the prunings do, so all trainings see the same part of it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer, rank_zero_info
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families import magnitude
from lightning_sparse.families.before_training import budgets
from lightning_sparse.families.common import FINAL_SPARSITY, PRUNING_SCOPE
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.rounds import Rounds
from lightning_sparse.families.shares import floors
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import Distribution, Scope, budget
from lightning_sparse.trainer.agreement import refuse_broken_clock
from lightning_sparse.trainer.guards import refuse_older_state, warn_of_equal_scores
from lightning_sparse.trainer.rewind import snapshot
from lightning_sparse.weights.base import Weight

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
        self._rounds = Rounds(self)

    @property
    def extra_metrics(self) -> dict[str, float]:
        """The number of prunings so far, to log."""
        return {"sparsity/round": float(self._rounds.over)}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The state to rewind to, too."""
        return [*super().state_tensors, self._rounds.point]

    @property
    def planned_density(self) -> dict[str, float]:
        """None: the layers begin dense."""
        return {}

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the fit makes up the trainings, and the budget the floors."""
        super().on_train_start(trainer, pl_module)
        self._rounds.begin(trainer, pl_module)
        for group in self._groups:
            weights = self.units(group.weights)
            floors(weights, self.min_layer_density, self.count(weights, self._rounds.total))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back if it is time; the schedulers have stepped."""
        super().on_train_epoch_start(trainer, pl_module)
        self._go_on(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go back if it is time within an epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._go_on(trainer, pl_module, batch_idx)

    def _go_on(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Between two trainings prune and rewind."""
        if self._rounds.end_of_training(trainer, module, batch_idx):
            for group in self._groups:
                self._prune(group.weights)
            self._rounds.rewind(trainer, module, [*self._weights.values()])
            rounds = f"round {self._rounds.over} of {self._rounds.total}"
            rank_zero_info(f"{self!r}: {rounds} leaves density {self.density:.4g}.")

    # ------------------------------------------------------------------ prune

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin dense, as all weights are."""

    def count(self, weights: Sequence[Weight], rounds: int) -> int:
        """Return the number of connections that so many rounds leave to ``weights``."""
        size = sum(weight.size for weight in weights)
        return [size, *budgets(size, budget(self.sparsity_target, size), self._rounds.total)][rounds]

    @torch.no_grad()
    def _prune(self, weights: Sequence[Weight]) -> None:
        """Keep the largest ``|W|``, as many as the rounds so far leave."""
        warn_of_equal_scores(self, [weight.name for weight in weights if weight.alike])
        weights = self.units(weights)
        total, final = (self.count(weights, rounds) for rounds in (self._rounds.over, self._rounds.total))
        magnitude.prune(weights, self.pattern, total, final, self.scope, self.distribution, self.min_layer_density)

    # ------------------------------------------------------------------ the family's verbs and state

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over; another fit goes on with the rounds that are left."""
        super().attach(choices, optimizers, resumed)
        if not resumed:
            self._rounds.go_on(fresh=self.density == 1)

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Prune newcomers at once as far as the others are."""
        super().attach_added(choices, optimizer)
        self._prune([self._weights[choice.name] for choice in choices])

    def state_dict(self) -> dict[str, Any]:
        """Return masks, rounds and the state to rewind to."""
        return {**super().state_dict(), **self._rounds.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        refuse_older_state(self, "rounds" in state_dict)
        super().load_state_dict(state_dict)
        refuse_broken_clock(self, state_dict, ("pruned", "earlier", "rounds"))
        self._rounds.load_state_dict(state_dict)

    def divided_state(self, trainer: Trainer) -> dict[str, Any]:
        """Return the state with a point to rewind to, of now, of which that of a checkpoint has the parts."""
        return {**super().divided_state(trainer), "rewind_point": snapshot(trainer, trainer.lightning_module)}
