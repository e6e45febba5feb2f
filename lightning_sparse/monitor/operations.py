"""The operations of a run: those of a dense step, and the share of them that the sparse steps take on average."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sparse.accounting import flops
from lightning_sparse.accounting.flops import Average, Flops
from lightning_sparse.compat.lightning import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_sparse.trainer.probe import probing
from lightning_sparse.trainer.shards import divides_weights

__all__ = ["Operations", "counted"]


def counted(trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Flops]:
    """Count the operations of a step on this batch, on a copy of the module; nothing if that cannot be done."""
    if divides_weights(trainer):
        rank_zero_info(
            "SparsityMonitor counts no operations where processes hold parts of weights, as such a module cannot be "
            "copied: its record leaves inference_flops and training_flops out."
        )
        return {}
    reason = "it optimizes manually"
    if module.automatic_optimization:
        try:
            with probing(trainer, module, []) as probe:
                return flops.dense_flops(probe.module, lambda: probe.loss(copy.deepcopy(batch), 0))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    rank_zero_warn(
        f"SparsityMonitor could not count the operations of {type(module).__name__} on a copy of it ({reason}): "
        "it reports only densities, time and memory. SparsityMonitor(flops=False) does so without a warning."
    )
    return {}


class Operations:
    """The operations of a run, by those of a dense one.

    Attributes:
        dense: of a dense step, by name of weight; empty: not counted.
        training: share of them in each step, averaged over the steps so far.
    """

    def __init__(self) -> None:
        self.dense: dict[str, Flops] = {}
        self.training = Average()

    def add(
        self,
        steps: int,
        density: Mapping[str, float],
        gradient_density: Mapping[str, float],
        all_at_last: Sequence[str],
    ) -> None:
        """Account for some steps.

        Args:
            steps: how many.
            density: of each weight in these steps.
            gradient_density: of its gradient.
            all_at_last: the weights whose whole gradient the last of the steps has computed.
        """
        if not self.dense or steps <= 0:
            return
        dense = flops.training(self.dense, {}, {})
        if all_at_last:
            gradients = {**gradient_density, **dict.fromkeys(all_at_last, 1.0)}
            self.training.add(flops.training(self.dense, density, gradients) / dense)
        rest = steps - bool(all_at_last)
        self.training.add(flops.training(self.dense, density, gradient_density) / dense, rest)

    def inference(self, density: Mapping[str, float]) -> float | None:
        """Return the share of a dense forward pass at these densities; None: not counted."""
        dense = flops.inference(self.dense, {})
        return flops.inference(self.dense, density) / dense if dense else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"training": vars(self.training).copy()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self.training = Average(**state_dict["training"])
