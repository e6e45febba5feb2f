"""OptG: optimizing gradient-driven criteria (Zhang et al., 2022).

A supermask trained beside the weights. Decisions: the schedule of sparsity runs over optimizer steps and is stretched
so that it begins dense and meets the target exactly; the mask is found anew every ``update_every`` steps; the scores
sit in the param group of their weight, so they have its momentum and weight decay, too.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.common import FINAL_SPARSITY
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.thresholds import Granularity, ThresholdBuffer, Thresholded
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.rules.budgets import Scope
from lightning_sparse.trainer.guards import refuse_unknown_length

__all__ = ["OptG"]


class OptG(Thresholded, TopKCallback):
    r"""OptG: a supermask whose scores add up the gradient-driven criterion of all weights, also of those removed.

    The layer computes with ``P = W * M``, M the largest scores ``S`` of all layers. Backward, straight through the
    selection, ``dS = r dP * W`` for every weight and ``dW = dP * M``. The sparsity of the step at the share u of the
    schedule is ``sparsity`` times a logistic curve with the given steepness around u = 1/2, which starts at 0 and ends
    at 1; r, the same curve before it is stretched so, scales the scores' learning rate.

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
        doc="of the logistic curve, above 0: the larger, the later and faster sparsity comes.",
    )
    end_at: float = option(
        default=1.0,
        check=partial(checks.fraction, "1 goes on to the last step.", above_0=True),
        doc="share of the training after which the target is reached, in (0, 1].",
    )
    begin_at: float = fixed(default=0.0)
    min_layer_density: float = 0.0
    threshold_weight_decay: float | None = fixed(default=None)
    scope: Scope = "global"
    granularity: Granularity = fixed(default="weight")  # a score for each
    init_threshold: float = fixed(default=0.0)
    reset_above: float | None = fixed(default=None)

    def __post_init__(self) -> None:
        """Begin at the start of the schedule."""
        super().__post_init__()
        self._rate = 0.0

    def new_target(self) -> None:
        """Nothing: scores are ranked."""

    # ------------------------------------------------------------------ what users read

    @property
    def criteria(self) -> dict[str, Tensor]:
        """The scores ``S`` of each weight, of its shape, by parameter name."""
        return self.thresholds

    @property
    def effective_thresholds(self) -> dict[str, Tensor]:
        """Nothing: weights are chosen by the rank of their scores."""
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

    def is_due(self, updates: int) -> bool:
        """Tell whether the mask is found anew after so many updates, the schedule's last in any case."""
        return super().is_due(updates) or updates == self.end

    def present(self, weights: Sequence[LatentWeight]) -> int:
        """Return the number of weights that are active now."""
        return sum(int(weight.buffers["A"].count_nonzero()) for weight in weights)

    def active(self, weights: Sequence[LatentWeight], updates: int) -> int:
        """Return the number of weights that the schedule leaves, never more than before."""
        present = self.present(weights)
        if updates == 0:
            return present
        size, final = sum(weight.size for weight in weights), self.final(weights)
        u = min(updates / self.end, 1.0)
        low, now, high = (_logistic(self.steepness * (x - 0.5)) for x in (0.0, u, 1.0))
        return min(present, size - round((size - final) * (now - low) / (high - low)))

    # ------------------------------------------------------------------ the method

    def scores(self, weight: LatentWeight) -> Tensor:
        """Return the scores S."""
        return weight.thresholds["t"].detach().nan_to_num(nan=math.inf, posinf=math.inf)

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102  (inherited)
        updates = max((group.updates for group in self._groups.values()), default=0)
        self._rate = _logistic(self.steepness * (min(updates / self.end, 1.0) - 0.5))
        super().before_step(optimizer, share, scale)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dS = r dP W`` and ``dW = dP M``."""
        torch.mul(dP, W, out=weight.thresholds.dtau["t"]).mul_(self._rate)
        dP.mul_(weight.matrix(weight.buffers["A"]))

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """Leave ``dS``; no regulariser."""


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))  # exp would overflow
