"""What the classifiers of this package share: cross-entropy and accuracy."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparse.compat import checks
from lightning_sparse.zoo.models.base import NetworkModule

__all__ = ["Classifier"]


class Classifier(NetworkModule, ABC):
    """Base of the classifiers: a subclass defines ``forward``, which returns logits ``(batch, classes)``.

    Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc`` once an epoch.

    Args:
        classes: number of classes, at least 2.
        top5: log ``val_acc5`` and ``test_acc5``, too: the share of images whose class is among the five most likely.
        **training: optimizer, schedule, label smoothing and weight decay: the arguments of ``NetworkModule``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, classes: int, top5: bool = False, **training: Any) -> None:
        super().__init__(**training)
        checks.integer(2, "It is the number of logits of the network.", classes=classes)
        checks.flag(top5=top5)
        if top5 and classes <= 5:
            raise ValueError(f"top5 needs more than five classes, got classes={classes!r}. Leave top5 out.")
        self.top5 = top5
        self.val_acc = MulticlassAccuracy(classes, average="micro")
        self.test_acc = MulticlassAccuracy(classes, average="micro")
        if top5:
            self.val_acc5 = MulticlassAccuracy(classes, average="micro", top_k=5)
            self.test_acc5 = MulticlassAccuracy(classes, average="micro", top_k=5)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the batch."""
        x, y = batch
        loss = cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely classes ``(batch,)``."""
        prediction: Tensor = self(batch[0]).argmax(1)
        return prediction

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        self.log(f"{stage}_loss", cross_entropy(logits, y), batch_size=len(y))
        for name in (f"{stage}_acc", f"{stage}_acc5") if self.top5 else (f"{stage}_acc",):
            metric: Any = getattr(self, name)
            metric(logits, y)
            self.log(name, metric, prog_bar=True, batch_size=len(y))
