"""What the networks of this package share: cross-entropy, accuracy, and an optimizer given from outside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sparse._extras import extra
from lightning_sparse._lightning import LightningModule

__all__ = ["Classifier", "LRSchedulerCallable", "OptimizerCallable", "sgd"]

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


def sgd(params: Iterable[Any]) -> Optimizer:
    """Return SGD with learning rate 0.01 and momentum 0.9, the papers' optimizer for MNIST."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


class Classifier(LightningModule, ABC):
    """Base of the classifiers: a subclass defines ``forward``, which returns logits ``(batch, classes)``.

    Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc`` once an epoch.

    Args:
        classes: number of classes, at least 2.
        optimizer: makes the optimizer from the parameters. In YAML: ``class_path`` and ``init_args``.
        lr_scheduler: makes the scheduler, stepped once an epoch, from the optimizer; None: a constant rate.
    """

    def __init__(self, classes: int, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}.")
        # Callables would tie checkpoints to code. Those who go on training after load_from_checkpoint give them anew.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        accuracy = extra("torchmetrics.classification", "examples").MulticlassAccuracy
        self.val_acc = accuracy(classes, average="micro")
        self.test_acc = accuracy(classes, average="micro")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the batch."""
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely classes ``(batch,)``."""
        prediction: Tensor = self(batch[0]).argmax(1)
        return prediction

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is one, the scheduler."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def _evaluate(self, stage: str, accuracy: Any, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits, y)
        self.log(f"{stage}_loss", cross_entropy(logits, y), batch_size=len(y))
        self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(y))
