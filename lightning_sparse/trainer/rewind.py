"""The state of a training that it can be rewound to."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_sparse.compat.shards import copied, is_sharded, layout, local
from lightning_sparse.compat.torch_private import tree_map
from lightning_sparse.rules.parts import divided_as, part_of
from lightning_sparse.trainer.guards import listed

__all__ = ["restore", "snapshot"]


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what a training depends on: tensors on the CPU, of DTensors the parts that are here, and plain values.

    Raises:
        MisconfigurationException: an optimizer cannot tell its state, or tensors are divided otherwise than by rows.
    """
    tensors = _tensors(module)
    _refuse_other_parts(tensors)
    return {
        "tensors": {name: copied(tensor, "cpu") for name, tensor in tensors.items()},
        "optimizers": {str(i): _copied(_state(o)) for i, o in enumerate(trainer.optimizers)},
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
            local(tensor).copy_(part_of(tensor).cut(state["tensors"][name]))
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
        optimizer.load_state_dict(_copied(saved))
        return
    now = optimizer.state_dict()["param_groups"]
    then = saved["param_groups"]
    groups = [{**group, "params": now[i]["params"]} for i, group in enumerate(then)] + now[len(then) :]
    moved = {
        old: new
        for group, other in zip(then, groups, strict=False)
        for old, new in zip(group["params"], other["params"], strict=False)
    }
    parameters = [*dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])]
    state = {moved[index]: _divided(values, parameters[moved[index]]) for index, values in saved["state"].items()}
    optimizer.load_state_dict(_copied({**saved, "state": state, "param_groups": groups}))


def _divided(values: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Return an optimizer's state of a parameter, divided over processes as that is."""
    alike = {key for key, x in values.items() if isinstance(x, Tensor) and x.shape == parameter.shape}
    return {key: divided_as(x, parameter) if key in alike else x for key, x in values.items()}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy."""
    copies: dict[str, Any] = tree_map(lambda x: copied(x) if is_sharded(x) else copy.deepcopy(x), state)
    return copies


def _refuse_other_parts(tensors: Mapping[str, Tensor]) -> None:
    others = [name for name, x in tensors.items() if is_sharded(x) and not layout(x).by_rows]
    if others:
        raise MisconfigurationException(
            f"A training can be rewound only if processes share tensors by rows, as FSDP2 divides them, but "
            f"{listed(others)} are divided otherwise. Use GMP, which prunes within one training."
        )
