"""Fit: what ties a callback to one fit, and how long that is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_sparse.trainer.written import Looks, Traces

__all__ = ["Fit", "Processes", "epochs", "steps"]


@dataclass
class Fit:
    """What a callback holds of the fit it is in; a fresh one between fits. Nothing of it is pickled or copied.

    Attributes:
        trainer: the Trainer; None until the weights have been taken over, and after the fit.
        module: the module it trains; None as the Trainer is.
        optimizers: those of the fit's start.
        handles: what is removed at the fit's end: hooks, and other things with ``remove``.
        backwards: number of micro-batches whose gradients are in the weights.
        logged_step: the latest step that was logged.
        first_steps: number of optimizer steps of the whole fit, here and on the first process.
        warned: the warnings that were given, which are given once.
        module_size: number of parameters of the module, weights of sparse layers counted as dense ones.
        traces: what the method's parameters looked like when it had written them last.
        looks: when their values are compared as well.
        drawn: whether weights look trained whose connections have been drawn at random for this fit, by name.
        restored_late: the weights and the state of a checkpoint, if there is one, come once the fit has started.
        identical_parts: names of weights of which several processes began with the same numbers.
    """

    trainer: Trainer | None = None
    module: LightningModule | None = None
    optimizers: list[Optimizer] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    backwards: int = 0
    logged_step: int = 0
    first_steps: dict[float, float] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    module_size: int = 0
    traces: Traces = field(default_factory=Traces)
    looks: Looks = field(default_factory=Looks)
    drawn: dict[str, bool] = field(default_factory=dict)
    restored_late: bool = False
    identical_parts: list[str] = field(default_factory=list)

    def __reduce__(self) -> tuple[type["Fit"], tuple[()]]:
        """Pickle and copy as a fresh one."""
        return Fit, ()

    def release(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()

    def remove(self, *kinds: type[Any]) -> None:
        """Take the hooks of these kinds away."""
        for handle in self.handles:
            if isinstance(handle, kinds):
                handle.remove()

    def tell_once(self, message: str) -> None:
        """Give a notice unless it was given."""
        if message not in self.warned:
            self.warned.add(message)
            rank_zero_info(message)

    def warn_once(self, key: str, message: str) -> None:
        """Give a warning unless one of the same key was given."""
        if key not in self.warned:
            self.warned.add(key)
            rank_zero_warn(message)


def epochs(trainer: Trainer) -> int | None:
    """Return the number of epochs of the whole fit, None if nothing bounds it."""
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs)
    if trainer.max_steps >= 0 and trainer.num_training_batches != float("inf"):
        an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        bounds.append(math.ceil(trainer.max_steps / max(an_epoch, 1)))
    return max(1, min(bounds)) if bounds else None


def steps(trainer: Trainer, before: Mapping[str, int]) -> float:
    """Return the number of optimizer steps of the whole fit; infinite if nothing tells how many.

    Args:
        trainer: whose ``max_epochs`` and ``max_steps`` count its earlier fits, too.
        before: the ``"epochs"`` and ``"steps"`` of these.
    """
    counted = float(trainer.estimated_stepping_batches)
    if counted < 0:  # -1 is max_steps, which is not set
        return math.inf
    if not any(before.values()):
        return counted
    batches, last_epoch = trainer.num_training_batches, trainer.max_epochs
    by_steps = float(trainer.max_steps - before["steps"]) if trainer.max_steps >= 0 else math.inf
    if math.isinf(batches) or last_epoch is None or last_epoch < 0:
        return by_steps
    an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    return min(float(an_epoch * (last_epoch - before["epochs"])), by_steps)


class Processes:
    """The processes of a training without a strategy of Lightning: each has all weights, and torch connects them.

    Args:
        root_device: of the module's parameters.

    Attributes:
        world_size: number of processes.
        global_rank: the number of this one.
    """

    model = None
    restore_checkpoint_after_setup = False

    def __init__(self, root_device: torch.device) -> None:
        self.root_device = root_device
        several = distributed.is_available() and distributed.is_initialized()
        self.world_size = distributed.get_world_size() if several else 1
        self.global_rank = distributed.get_rank() if several else 0

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the value that process ``src`` has."""
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values, src)
        return values[0]

    def reduce(self, x: Any, reduce_op: str = "mean") -> Any:
        """Return the mean or sum of a tensor over the processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(x)
            if reduce_op == "mean":
                x /= self.world_size
        return x

    def reduce_boolean_decision(self, decision: bool) -> bool:
        """Tell whether all processes say so."""
        count = self.reduce(torch.tensor(int(decision), device=self.root_device), "sum")
        return int(count) == self.world_size
