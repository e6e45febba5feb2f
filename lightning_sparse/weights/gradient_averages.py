"""An exponential average of the dense gradient beside each masked weight, in one of its buffers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.compat.torch_private import lerp_each
from lightning_sparse.rules import select
from lightning_sparse.rules.criteria import mean_momentum
from lightning_sparse.rules.parts import WHOLE
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import dense, finite_gradients

__all__ = ["largest_inactive", "mean_of_connections", "start", "update_"]


def start(weight: Weight) -> Tensor:
    """Return an average of 0, in single precision at least."""
    (held,) = dense([weight])
    return torch.zeros_like(held.mask, dtype=torch.promote_types(held.W.dtype, torch.float32))


def update_(weights: Sequence[Weight], key: str, smoothing: float, scale: float) -> None:
    """Take the gradients of a step into the averages, unless AMP skips it.

    Args:
        weights: those that have a gradient; it is the same on all processes.
        key: of the buffers.
        smoothing: share of its past that the average keeps, in [0, 1).
        scale: what gradients are multiplied with (under AMP).
    """
    held = dense(weights)
    if finite_gradients(held):
        averages = [weight.buffers[key] for weight in held]
        gradients = [weight.dP.to(average.dtype) for weight, average in zip(held, averages, strict=True)]
        lerp_each(averages, gradients if scale == 1 else [dP / scale for dP in gradients], 1 - smoothing)


def mean_of_connections(weight: Weight, key: str) -> float:
    """Return the mean magnitude of a weight's average over its active connections, those of all processes."""
    here = mean_momentum(weight.buffers[key], weight.mask)
    if weight.part is WHOLE or not weight.num_active:
        return here
    sum_here = torch.tensor(here * select.count(weight.mask), dtype=torch.float64)
    return float(weight.part.sums(sum_here)) / weight.num_active


def largest_inactive(weight: Weight, key: str, n: int) -> Tensor:
    """Return the flat positions, ascending, of the ``n`` inactive connections whose averages are largest."""
    found = weight.part.top_k_positions(weight.buffers[key].abs(), n, among=~weight.mask)
    return weight.part.positions(found)
