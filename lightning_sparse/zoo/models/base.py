"""What all networks of this package share: optimizer and learning-rate schedule given from outside."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule
from lightning_sparse.compat.lightning_private import forget_training_loader
from lightning_sparse.zoo.models.lr_schedules import EpochLR

__all__ = ["LRSchedulerCallable", "NetworkModule", "OptimizerCallable", "sgd"]

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


def sgd(params: Iterable[Any]) -> Optimizer:
    """Return SGD with learning rate 0.01 and momentum 0.9, the papers' optimizer for MNIST."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


class NetworkModule(LightningModule):
    """Base of the networks: optimizer, learning-rate schedule, weight decay and label smoothing are arguments.

    Args:
        optimizer: makes the optimizer from the parameters. In YAML: ``class_path`` and ``init_args``.
        lr_scheduler: makes the scheduler from the optimizer; None: a constant rate.
        lr_interval: the scheduler moves after each ``"epoch"`` or each optimizer ``"step"``. The schedules of
            ``zoo.models.lr_schedules`` that count epochs do so either way; torch's own count their moves.
        label_smoothing: share of the target, in [0, 1], that is spread over all classes; in training alone.
        decay_norm_and_bias: whether the optimizer's weight decay is for the parameters of norms and biases, too.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        decay_norm_and_bias: bool = True,
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise ValueError(f"optimizer must make an optimizer of parameters, got {optimizer!r}. Give a function.")
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise ValueError(f"lr_scheduler must make a scheduler of an optimizer, got {lr_scheduler!r}. Give None.")
        checks.one_of(("epoch", "step"), lr_interval=lr_interval)
        checks.flag(decay_norm_and_bias=decay_norm_and_bias)
        checks.fraction("The papers' value is 0.1; 0 is none.", label_smoothing=label_smoothing)
        # Callables would tie checkpoints to code. Those who go on training after load_from_checkpoint give them anew.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.decay_norm_and_bias = decay_norm_and_bias

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is one, the scheduler."""
        optimizer = self.make_optimizer(self._groups())
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        if self.lr_interval == "step" and isinstance(scheduler, EpochLR):
            scheduler.count_steps(self._steps_per_epoch())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval}}

    def _groups(self) -> Iterable[Any]:
        if self.decay_norm_and_bias:
            return self.parameters()
        weights = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        return [{"params": weights}, {"params": others, "weight_decay": 0.0}]

    def _steps_per_epoch(self) -> float:
        self.trainer.fit_loop.setup_data()  # the number of batches is not known before
        batches = self.trainer.num_training_batches
        forget_training_loader(self.trainer)  # it is set up when a checkpoint's place in the epoch can be restored
        if batches == float("inf"):
            raise ValueError(
                'lr_interval must be "epoch" when the length of the training data is not known, got "step": '
                "a schedule that counts epochs cannot tell how many steps make one."
            )
        return float(-(-batches // self.trainer.accumulate_grad_batches))
