"""What the optimizer's state is of latent weights that enter the set of those that are updated."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.optimizers import states
from lightning_sparse.compat.shards import local
from lightning_sparse.rules import select
from lightning_sparse.rules.matrices import write_matrix
from lightning_sparse.weights.fresh import COPIES, SCALES, mean_of_others, whole_layer
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["refresh"]


def refresh(optimizer: Optimizer, weights: Sequence[LatentWeight], key: str, before: Mapping[str, Tensor]) -> None:
    """Give what has entered a set a fresh state, as grown connections have; what is outside has none.

    Args:
        optimizer: that updates the weights.
        weights: all of its weights.
        key: of the set, among their buffers.
        before: what the set was, by the weights' names; the same tensor: nothing has entered.
    """
    for weight in weights:
        now, earlier = weight.buffers[key], before[weight.name]
        if now is earlier:
            continue
        assert weight.parameter is not None
        kept = [item for state in states(optimizer, weight.parameter) for item in state.items()]
        for name, state in kept:
            if isinstance(state, Tensor) and state.shape == weight.shape and name not in COPIES:
                select.zero_outside_(local(state), earlier | ~now)
                if name in SCALES:
                    _fill_with_means(weight, local(state), now, earlier)


def _fill_with_means(weight: LatentWeight, state: Tensor, now: Tensor, before: Tensor) -> None:
    """Set a state of what has entered, where it is 0, to the mean of its row's others, as of grown connections."""
    rows, staying, entering = (weight.matrix(x) for x in (state, now & before, ~before))
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums, others = (exact * staying).sum(1), staying.sum(1)
    everywhere = whole_layer(weight.part, sums, others)
    means = mean_of_others(sums, others, torch.arange(len(rows), device=rows.device), 0.0, everywhere)
    entering = entering & weight.matrix(now)
    write_matrix(state, torch.where(entering, means[:, None].to(rows.dtype), rows), weight.outputs)
