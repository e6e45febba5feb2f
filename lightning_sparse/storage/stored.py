"""Stored: a method whose weights a store keeps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.storage.store import Owner, Store
from lightning_sparse.weights.group import WeightGroups

__all__ = ["Stored"]


class Stored(Owner):
    """Passes Lightning's hooks on to the store, and reads its weights.

    Attributes:
        store: where the weights are kept.
    """

    store: Store
    _groups: WeightGroups

    # ------------------------------------------------------------------ what users read

    @property
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is active: a boolean tensor of the weight's shape, by parameter name."""
        return {name: weight.mask for name, weight in self._weights.items()}

    def mask(self, name: str) -> Tensor:
        """Return one of ``masks``, without making the others."""
        return self._weights[name].mask

    @property
    def layer_count(self) -> dict[str, int]:
        """Number of active connections of each layer, by parameter name."""
        return {name: weight.num_active for name, weight in self._weights.items()}

    @property
    def mask_versions(self) -> dict[str, int]:
        """A number for each weight, another one whenever its mask has changed."""
        return {name: weight.mask_version for name, weight in self._weights.items()}

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get ready before the module is configured and a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        self.store.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over."""
        self.store.begin_fit(trainer)
        super().on_fit_start(trainer, pl_module)
        self.store.begin_training(trainer)

    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise unless all the weights are held as the store does."""
        self.store.refuse(choices)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the gradients of a micro-batch."""
        super().on_after_backward(trainer, pl_module)
        self.store.after_backward(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the store have its say in what a checkpoint holds of the module."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.store.on_save_checkpoint(pl_module, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights behind, and the module as it was."""
        super().on_exception(trainer, pl_module, exception)
        self.store.abort()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        finish = self.store.end(stage)
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._groups.end()
            for weight in self._weights.values():
                weight.detach()
        finish()
