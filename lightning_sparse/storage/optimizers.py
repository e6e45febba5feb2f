"""The state of an optimizer in a checkpoint that was written with the other storage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.weights.base import Weight

__all__ = ["carry_over"]


def carry_over(
    weights: Iterable[Weight],
    carried: Callable[[Weight, Tensor], Tensor | None],
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a state that an optimizer is about to load, with what it keeps of ``weights`` as their storage has it.

    Args:
        weights: those of the fit.
        carried: returns what a tensor of the state becomes; None: it is not one number for each connection.
        optimizer: that trains them.
        state_dict: its state, of the same parameters in the same order.

    Raises:
        MisconfigurationException: a tensor cannot be carried over.
    """
    ours = {id(weight.parameter): weight for weight in weights}
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    for index, parameter in zip(saved, parameters, strict=False):  # the optimizer itself refuses another number
        weight = ours.get(id(parameter))
        if weight is not None and index in states:
            states[index] = {key: _carried(weight, key, x, carried, optimizer) for key, x in states[index].items()}
    return {**state_dict, "state": states}


def _carried(
    weight: Weight, key: str, x: Any, carried: Callable[[Weight, Tensor], Tensor | None], optimizer: Optimizer
) -> Any:
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    factors = any("Adafactor" in kind.__name__ for kind in type(optimizer).__mro__)
    result = None if factors else carried(weight, x)
    if result is None:
        raise MisconfigurationException(
            f"The checkpoint was written with the other storage, and what {type(optimizer).__name__} keeps of "
            f"{weight.name} ({key!r} of shape {tuple(x.shape)}) is not one number for each weight, so it cannot be "
            "carried over. Give the callback the storage that the checkpoint was written with. To start from its "
            "weights with a fresh optimizer: model.load_state_dict(lightning_sparse.load_dense(path)), then "
            "trainer.fit(model) without ckpt_path and with initial='zeros'."
        )
    return result
