"""What optimizer state a grown connection starts with.

A momentum starts at 0. A scale that gradients are divided by does not. Adam and its like count steps for a whole
tensor, so after the first steps nothing corrects the bias of a 0, and a new connection would move several times as far
as old ones. So its scale starts at the mean of its neuron's other connections (measured in docs/guides/optimizers.md).
"""

from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.optimizers import states
from lightning_sparse.rules.parts import WHOLE, Whole
from lightning_sparse.weights.base import Weight, param_group

__all__ = ["COPIES", "SCALES", "fresh_value", "mean_of_others", "reset_momentum", "whole_layer"]

#: states that gradients or steps are measured by: means, sums and maxima of their squares or magnitudes
SCALES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "sum"})

#: states that are weights themselves: the slow ones of Lookahead in timm, pytorch_optimizer and torch_optimizer
COPIES = frozenset({"lookahead_slow_buff", "slow_params", "slow_param", "slow_buffer"})

#: settings of a param group that states begin at, if not at 0: of Rprop and of Adagrad
_BEGINS_AT = {"step_size": "lr", "sum": "initial_accumulator_value"}


def fresh_value(weight: Weight, key: str) -> float:
    """Return what the optimizer's state of this name is for an element that has not been trained."""
    setting = _BEGINS_AT.get(key)
    return float(param_group(weight).get(setting, 0.0)) if setting else 0.0


def mean_of_others(
    sums: Tensor, others: Tensor, rows: Tensor, otherwise: float, layer: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return the mean of a state over the other connections of each new one's row.

    Args:
        sums: of the state over the other connections of each row, ``(out,)``.
        others: their number, ``(out,)``; a row that has none has the mean of the layer.
        rows: those of the new connections.
        otherwise: the value in a layer that has no other connection.
        layer: sum and number over all rows, if some of them are on other processes.

    >>> import torch
    >>> sums, others = torch.tensor([6.0, 0.0, 0.0]), torch.tensor([2, 1, 0])
    >>> mean_of_others(sums, others, torch.tensor([0, 1, 2]), 0.0)
    tensor([3., 0., 2.])
    """
    total, number = layer or (sums.sum(), others.sum())
    of_layer: Any = total / number
    of_layer = of_layer.where(number > 0, otherwise)
    return (sums / others).where(others > 0, of_layer)[rows]


def whole_layer(part: Whole, sums: Tensor, others: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what ``mean_of_others`` is told of the rows of all processes; None: all rows are here."""
    if part is WHOLE:
        return None
    total, number = part.sums(torch.stack([sums.sum().double(), others.sum().double()]))
    return total.to(sums.dtype), number.to(sums.dtype)


def reset_momentum(optimizer: Any) -> None:
    """Set to 0 what an optimizer keeps of earlier gradients for each element of all its parameters, but scales."""
    others = SCALES | COPIES | _BEGINS_AT.keys()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for kept in states(optimizer, parameter):
            for key, state in kept.items():
                if isinstance(state, Tensor) and state.shape == parameter.shape and key not in others:
                    state.zero_()
