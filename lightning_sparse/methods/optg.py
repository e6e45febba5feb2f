"""OptG: optimizing gradient-driven criteria (Zhang et al., 2022).

A supermask trained beside the weights. Decisions: the schedule of sparsity runs over optimizer steps and is stretched
so that it begins dense and meets the target exactly; the mask is found anew every ``update_every`` steps; the method
trains the scores by itself, by plain SGD with the learning rate of their weight, whatever the optimizer: they are sums
of what the loss said, which neither weight decay nor Adam's normalisation may change.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.common import FINAL_SPARSITY
from lightning_sparse.families.latent import LatentGroup, LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.rules.budgets import Scope
from lightning_sparse.rules.schedules import logistic
from lightning_sparse.trainer.guards import refuse_older_state, refuse_unknown_length
from lightning_sparse.weights.scores import TrainedScores, zeros

__all__ = ["OptG"]


class OptG(TopKCallback):
    r"""OptG: a supermask whose scores add up the gradient-driven criterion of all weights, also of those removed.

    The layer computes with ``P = W * M``, M the largest scores ``S`` of all layers. Backward, straight through the
    selection, ``dS = r dP * W`` for every weight and ``dW = dP * M``. After each update of the optimizer ``S`` loses
    ``lr dS``, with the learning rate of its weight. The sparsity of the step at the share u of the schedule is
    ``sparsity`` times a logistic curve with the given steepness around u = 1/2, which starts at 0 and ends at 1; r is
    the same curve before it is stretched so.

    Raises:
        MisconfigurationException: at fit start, if nothing bounds the training.

    Example:
        >>> from lightning_sparse import OptG
        >>> callback = OptG(sparsity=0.9)

    Reference:
        "OptG: Optimizing Gradient-driven Criteria in Network Sparsity", arXiv 2201.12826.
    """

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=FINAL_SPARSITY)
    steepness: float = option(
        default=10.0,
        check=partial(checks.above, 0, "10 is near 0 and 1 at the ends."),
        doc="of the logistic curve, above 0: with a larger value sparsity rises later and faster.",
    )
    end_at: float = option(
        default=0.6,
        check=partial(checks.fraction, "0.6 leaves time to train the final network.", above_0=True),
        doc="share of the training after which the target is reached, in (0, 1].",
    )
    min_layer_density: float = 0.0
    scope: Scope = "global"
    joins = True
    scale_init: bool = fixed(default=False)  # it begins dense

    # ------------------------------------------------------------------ what users read

    @property
    def criteria(self) -> dict[str, Tensor]:
        """The scores ``S`` of each weight, of its shape, by parameter name."""
        return {name: weight.part.joined(weight.buffers["S"].detach()) for name, weight in self._weights.items()}

    @property
    def planned_density(self) -> dict[str, float]:
        """None: the layers begin dense."""
        return {}

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the schedule has an end, and that its target can be met."""
        super().on_train_start(trainer, pl_module)
        refuse_unknown_length(self, self.total_steps, "to reach its sparsity in time")
        for group in self._groups.values():
            self.final_counts(group.weights)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a training that ended before its schedule."""
        super().on_train_end(trainer, pl_module)
        for group in self._groups.values():
            active, final = self.present(group.weights), self.final(group.weights)
            if active > final:
                self.warn_once(
                    f"{self!r} has {active} active weights, not {final}: only {group.updates} updates of "
                    f"{self.end} planned were made. Lower end_at, or set max_epochs or max_steps to what is trained."
                )

    @property
    def end(self) -> int:
        """Number of updates after which the target is reached."""
        return max(1, math.ceil(self.end_at * self.total_steps))

    def is_due(self, group: LatentGroup) -> bool:
        """Tell whether the mask is found anew: also as soon as the schedule's end is reached, or lies behind."""
        return super().is_due(group) or (group.updates >= self.end and not self._is_final(group))

    def _is_final(self, group: LatentGroup) -> bool:
        """Tell whether the target is met, which it then is for good."""
        if id(group) not in self._final and self.present(group.weights) <= self.final(group.weights):
            self._final.add(id(group))
        return id(group) in self._final

    def present(self, weights: Sequence[LatentWeight]) -> int:
        """Return the number of weights that are active now."""
        return sum(self.ones({weight.name: weight.buffers["A"] for weight in weights}).values())

    def active(self, weights: Sequence[LatentWeight], updates: int) -> int:
        """Return the number of weights that the schedule leaves, never more than before."""
        present = self.present(weights)
        if updates == 0:
            return present
        size, final = sum(weight.size for weight in weights), self.final(weights)
        low, now, high = (self.curve(n) for n in (0, updates, self.end))
        return min(present, size - round((size - final) * (now - low) / (high - low)))

    def curve(self, updates: int) -> float:
        """Return the logistic curve after so many updates."""
        return logistic(updates / self.end, self.steepness)

    # ------------------------------------------------------------------ the method

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """Begin with scores of 0."""
        return {**super().new_buffers(latent), "S": zeros(latent)}

    def scores(self, weight: LatentWeight) -> Tensor:
        """Return the scores S."""
        return weight.buffers["S"]

    def written(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Nothing: the scores are what they were."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        refuse_older_state(self, all("S" in state["buffers"] for state in state_dict["weights"].values()))
        super().load_state_dict(state_dict)

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """``dS = r dP W``, kept until the update; what is not finite counts as 0."""
        group = self._groups[id(optimizer)]
        if share:
            self._trained_scores.note(group.weights, self.curve(group.updates) / scale)
        super().before_step(optimizer, share, scale)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP M``."""
        dP.mul_(weight.matrix(weight.buffers["A"]))

    def stepped(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """``S <- S - lr dS``, with the learning rate of the update that was made."""
        self._trained_scores.descend(optimizer, weights)

    # ------------------------------------------------------------------ a fit ends

    def _release(self) -> None:
        super()._release()
        self._trained_scores = TrainedScores("S")
        self._final: set[int] = set()  # optimizers' groups that have come to their target

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what is of the fit alone."""
        return {**super().__getstate__(), "_trained_scores": TrainedScores("S"), "_final": set()}
