"""Learning-rate schedules of the papers that torch does not have in one piece: those that begin with a warm-up."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sparse.compat import checks

__all__ = ["EpochLR", "InverseSquareRootLR", "WarmupCosineLR", "WarmupMultiStepLR"]


class EpochLR(LRScheduler, ABC):
    """A schedule in epochs that may move with every optimizer step; a subclass defines ``factor``.

    The rate rises linearly over the warm-up and reaches its full value with the last move of it: with moves by epoch
    and a warm-up of 5 these are 1/5, 2/5, 3/5, 4/5 and 1.

    Args:
        optimizer: its rates are the full ones.
        warmup: length of the warm-up in epochs.
    """

    def __init__(self, optimizer: Optimizer, warmup: float) -> None:
        checks.at_least(0, "It counts epochs; 0 is none.", warmup=warmup)
        self.warmup = warmup
        self.steps_per_epoch = 1.0
        super().__init__(optimizer)

    @abstractmethod
    def factor(self, epoch: float) -> float:
        """Return the share of the full rate at ``epoch``, a real number from 0 on, leaving the warm-up aside."""

    @property
    @abstractmethod
    def length(self) -> float:
        """The number of epochs after which the rate stays as it is."""

    @property
    def total_steps(self) -> int:
        """The number of moves after which the rate stays as it is."""
        return math.ceil(self.length * self.steps_per_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group."""
        moves = self.warmup * self.steps_per_epoch
        warm = min(1.0, (self.last_epoch + 1) / moves) if moves else 1.0
        return [base * warm * self.factor(self.last_epoch / self.steps_per_epoch) for base in self.base_lrs]

    def count_steps(self, steps_per_epoch: float) -> None:
        """Move with each optimizer step from now on, of which ``steps_per_epoch`` make an epoch."""
        self.steps_per_epoch = steps_per_epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class WarmupMultiStepLR(EpochLR):
    """Linear warm-up, then steps: the rate is multiplied by ``gamma`` at each milestone.

    Args:
        optimizer: its rates are the full ones.
        milestones: epochs, increasing.
        gamma: factor, above 0.
        warmup: length of the warm-up in epochs, part of the epochs that milestones count.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.models.lr_schedules import WarmupMultiStepLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> scheduler = WarmupMultiStepLR(optimizer, milestones=[60, 120, 160], gamma=0.2, warmup=1)
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[float], gamma: float = 0.1, warmup: float = 0.0
    ) -> None:
        checks.at_least(0, "The papers' values are 0.1 and 0.2.", gamma=gamma)
        checks.vector("They are epochs.", milestones=milestones)
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f"milestones must be increasing epochs, got {list(milestones)}.")
        self.milestones = list(milestones)
        self.gamma = gamma
        super().__init__(optimizer, warmup)

    @property
    def length(self) -> float:
        """The last milestone, or the warm-up."""
        return max([self.warmup, *self.milestones])

    def factor(self, epoch: float) -> float:
        """Return ``gamma`` to the number of milestones behind."""
        return float(self.gamma ** sum(milestone <= epoch for milestone in self.milestones))


class WarmupCosineLR(EpochLR):
    """Linear warm-up, then half a cosine that falls to 0 at the end of training.

    Args:
        optimizer: its rates are the full ones.
        epochs: length of the training in epochs, with the warm-up.
        warmup: length of the warm-up in epochs.
    """

    def __init__(self, optimizer: Optimizer, epochs: float, warmup: float = 0.0) -> None:
        checks.at_least(0, "It counts epochs; 0 is none.", warmup=warmup)
        checks.above(0, "It is the length of the training.", epochs=epochs)
        if epochs <= warmup:
            raise ValueError(f"epochs must be greater than warmup, {warmup!r}, got {epochs!r}.")
        self.epochs = epochs
        super().__init__(optimizer, warmup)

    @property
    def length(self) -> float:
        """The number of epochs it was made for."""
        return self.epochs

    def factor(self, epoch: float) -> float:
        """Return ``(1 + cos(pi p)) / 2``, where ``p`` runs from 0 at the end of the warm-up to 1."""
        share = (epoch - self.warmup) / (self.epochs - self.warmup)
        return (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


class InverseSquareRootLR(LRScheduler):
    """Linear warm-up, then a fall with the square root of the step (Vaswani et al., 2017, equation 3).

    At step ``n``, from 1 on: ``min(n / w, sqrt(w / n))`` of the optimizer's rate, which is thus the peak; that of the
    Transformer's paper is ``(width * w) ** -0.5``. It counts its moves: use it with ``lr_interval="step"``.

    Args:
        optimizer: its rates are the peak.
        warmup_steps: length ``w`` of the warm-up in optimizer steps, at least 1.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 4000) -> None:
        checks.integer(1, "The papers' value is 4000.", warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group."""
        step = self.last_epoch + 1
        factor = min(step / self.warmup_steps, math.sqrt(self.warmup_steps / step))
        return [base * factor for base in self.base_lrs]
