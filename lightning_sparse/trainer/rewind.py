"""The state of a training that it can be rewound to."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, MisconfigurationException, Trainer

__all__ = ["restore", "snapshot"]


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what a training depends on: tensors on the CPU and plain values.

    Raises:
        MisconfigurationException: an optimizer cannot tell its state.
    """
    return {
        "tensors": {name: tensor.detach().cpu().clone() for name, tensor in _tensors(module).items()},
        "optimizers": {str(i): copy.deepcopy(_state(o)) for i, o in enumerate(trainer.optimizers)},
        "schedulers": {
            str(i): copy.deepcopy(config.scheduler.state_dict())
            for i, config in enumerate(trainer.lr_scheduler_configs)
        },
    }


@torch.no_grad()
def restore(state: Mapping[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Bring back what ``snapshot`` has returned; what has joined the training since then stays as it is."""
    for name, tensor in _tensors(module).items():
        if name in state["tensors"]:
            tensor.copy_(state["tensors"][name])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"].values(), strict=True):
        _load(optimizer, saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"].values(), strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(saved))


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _state(optimizer: Optimizer) -> dict[str, Any]:
    try:
        return optimizer.state_dict()
    except AttributeError as error:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} cannot be rewound, nor saved in a checkpoint: its state_dict() fails "
            f"({error}). An optimizer must call super().__init__(params, defaults) of torch.optim.Optimizer."
        ) from error


def _load(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Bring an optimizer's state back; groups and weights that joined it since then stay, without state."""
    if "param_groups" not in saved:  # of an optimizer that wraps another, in a form of its own
        optimizer.load_state_dict(copy.deepcopy(saved))
        return
    now = optimizer.state_dict()["param_groups"]
    then = saved["param_groups"]
    groups = [{**group, "params": now[i]["params"]} for i, group in enumerate(then)] + now[len(then) :]
    moved = {
        old: new
        for group, other in zip(then, groups, strict=False)
        for old, new in zip(group["params"], other["params"], strict=False)
    }
    state = {moved[index]: values for index, values in saved["state"].items()}
    optimizer.load_state_dict(copy.deepcopy({**saved, "state": state, "param_groups": groups}))
