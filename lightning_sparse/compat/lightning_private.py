"""Lightning's private corners: each use of a name that Lightning may change stands here, with what it relies on.

All of them are there in every Lightning from 2.5 on, the oldest that is supported, unless it says otherwise.
"""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.compat.lightning import Callback, Trainer

__all__ = [
    "KeepsConfiguredModel",
    "averaged_module",
    "averages_now_and_then",
    "configured",
    "forget_training_loader",
    "is_redirected",
    "saves_by_shards",
    "state_key",
    "steps_logged",
    "training_loader",
]


class KeepsConfiguredModel:
    """For a LightningCLI: a checkpoint of ``--ckpt_path`` does not override the model as it is configured.

    Relies on ``LightningCLI._parse_ckpt_path``, which reads the model's arguments off the checkpoint; where there is
    no such method, nothing is overridden. This must be the first of the bases.
    """

    def _parse_ckpt_path(self) -> None:
        """Read nothing."""


def configured(cli: Any, key: str) -> Any:
    """Return what the command's configuration has for ``key``, with classes instantiated.

    Relies on ``LightningCLI._get``, which knows of subcommands.
    """
    return cli._get(cli.config_init, key)


def steps_logged(trainer: Trainer) -> int:
    """Return the number of steps that loggers count by.

    Relies on ``_batches_that_stepped`` of the loop of an epoch, which ``self.log`` counts by: unlike ``global_step``
    it counts a batch once, however many optimizers step.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def training_loader(trainer: Trainer) -> Any:
    """Return the Trainer's ``CombinedLoader`` of training data; None before it is set up.

    Relies on ``fit_loop._combined_loader``.
    """
    return trainer.fit_loop._combined_loader


def forget_training_loader(trainer: Trainer) -> None:
    """Have the training data set up anew when the fit comes to it; relies on ``fit_loop._combined_loader``."""
    trainer.fit_loop._combined_loader = None


def averages_now_and_then(trainer: Trainer) -> bool:
    """Tell whether the processes average their models every so many steps, in place of gradients.

    Relies on ``DDPStrategy._model_averaging_period``.
    """
    return getattr(trainer.strategy, "_model_averaging_period", None) is not None


def averaged_module(callback: Callback) -> nn.Module | None:
    """Return the module that a callback keeps an average of weights over time in; None if it keeps none.

    Relies on ``_average_model`` of ``StochasticWeightAveraging`` and of ``WeightAveraging``, there since Lightning
    2.6, which wraps it in an ``AveragedModel``.
    """
    average = getattr(callback, "_average_model", None)
    if isinstance(average, AveragedModel):
        return average.module
    return average if isinstance(average, nn.Module) else None


def state_key(callback: Callback, **arguments: Any) -> str:
    """Return the key of a callback's state in checkpoints, for callbacks that may stand there twice.

    Relies on ``Callback._generate_state_key``, which ModelCheckpoint and EarlyStopping call.
    """
    return callback._generate_state_key(**arguments)


def saves_by_shards(trainer: Trainer) -> bool:
    """Tell whether each process writes its shards into a folder, in place of one that writes whole tensors.

    Relies on ``ModelParallelStrategy._save_distributed_checkpoint``.
    """
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


def is_redirected(module: nn.Module) -> bool:
    """Tell whether the call of a module that is running stands for a step, such as ``training_step``.

    With several processes Lightning sends steps through the module's own call, by a ``forward`` of the class
    ``_ForwardRedirection``.
    """
    return "_ForwardRedirection" in getattr(module.forward, "__qualname__", "")
