"""OptG: optimizing gradient-driven criteria (Zhang et al., 2022).

A supermask trained beside the weights. Decisions: the schedule of sparsity runs over optimizer steps and is stretched
so that it begins dense and meets the target exactly; the mask is found anew every ``update_every`` steps; the scores
sit in the param group of their weight, so they have its momentum and weight decay, too.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.rules.budgets import Scope

__all__ = ["OptG"]


class OptG(TopKCallback):
    r"""OptG: a supermask whose scores add up the gradient-driven criterion of all weights, also of those removed.

    The layer computes with ``P = W * M``, M the largest scores ``S`` of all layers. Backward, straight through the
    selection, ``dS = r dP * W`` for every weight and ``dW = dP * M``. The sparsity of the step at the share u of the
    schedule is ``sparsity`` times a logistic curve with the given steepness around u = 1/2, which starts at 0 and ends
    at 1; r, the same curve before it is stretched so, scales the scores' learning rate.

    Args:
        sparsity: share of zeros at the end over all selected weights, in [0, 1).
        steepness: of the logistic curve, above 0: the larger, the later and faster sparsity comes.
        end_at: share of the training after which the target is reached, in (0, 1].
        scope: the largest scores of all layers together (``"global"``, the paper's) or of each ``"layer"``.
        update_every: number of optimizer steps from one choice of the mask to the next.
        options: ``distribution`` (under ``scope="layer"``), ``min_layer_density``, ``include``, ``exclude``,
            ``log_every_n_steps``; see :class:`~lightning_sparse.families.top_k.TopKCallback`.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: at fit start, if nothing bounds the training.

    Example:
        >>> from lightning_sparse import OptG
        >>> callback = OptG(sparsity=0.9)

    Reference:
        "OptG: Optimizing Gradient-driven Criteria in Network Sparsity", arXiv 2201.12826.
    """

    threshold_names = ("t",)
    granularity = "weight"

    def __init__(
        self,
        sparsity: float,
        steepness: float = 10.0,
        end_at: float = 1.0,
        scope: Scope = "global",
        update_every: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, scope, update_every, **options)
        checks.above(0, "10 is near 0 and 1 at the ends.", steepness=steepness)
        checks.fraction("1 goes on to the last step.", above_0=True, end_at=end_at)
        self.steepness = steepness
        self.end_at = end_at
        self._rate = 0.0

    @property
    def criteria(self) -> dict[str, Tensor]:
        """The scores ``S`` of each weight, of its shape, by parameter name."""
        return self.thresholds

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that the schedule has an end."""
        super().on_train_start(trainer, pl_module)
        self._require_length("to reach its sparsity in time")
        for optimizer in trainer.optimizers:
            self.check(self._owned(optimizer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before its schedule."""
        for optimizer in trainer.optimizers:
            weights = self._owned(optimizer)
            held, final = self.chosen(weights), self.final(weights)
            if held > final:
                self._warn_once(
                    f"OptG has {held} active weights, not {final}: only {self._clock(weights)} updates of "
                    f"{self.end()} planned were made. Lower end_at, or set max_epochs or max_steps to what is trained."
                )

    def end(self) -> int:
        """Return the number of updates after which the target is reached."""
        return max(1, math.ceil(self.end_at * self.total_steps))

    def is_due(self, updates: int) -> bool:
        """Tell whether the mask is found anew after so many updates, the schedule's last in any case."""
        return super().is_due(updates) or updates == self.end()

    def chosen(self, weights: Sequence[LatentWeight]) -> int:
        """Return the number of weights that are active now."""
        return sum(int(weight.buffers["A"].count_nonzero()) for weight in weights)

    def active(self, weights: Sequence[LatentWeight], updates: int) -> int:
        """Return the number of weights that the schedule leaves, never more than before."""
        held = self.chosen(weights)
        if updates == 0:
            return held
        size, final = sum(weight.latent.numel() for weight in weights), self.final(weights)
        u = min(updates / self.end(), 1.0)
        low, now, high = (_logistic(self.steepness * (x - 0.5)) for x in (0.0, u, 1.0))
        return min(held, size - round((size - final) * (now - low) / (high - low)))

    # ------------------------------------------------------------------ the method

    def scores(self, weight: LatentWeight) -> Tensor:
        """Return the scores S."""
        return weight.thresholds["t"].detach().nan_to_num(nan=math.inf, posinf=math.inf)

    def before_step(self, *args: Any) -> None:  # noqa: D102
        updates = max(self._updates.values(), default=0)
        self._rate = _logistic(self.steepness * (min(updates / self.end(), 1.0) - 0.5))
        super().before_step(*args)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dS = r dP W`` and ``dW = dP M``."""
        torch.mul(dP, W, out=weight.dtau["t"]).mul_(self._rate)
        dP.mul_(weight.matrix(weight.buffers["A"]))


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))  # exp would overflow
