"""Boolean masks: pure functions of tensors."""

import torch
from torch import Tensor

__all__ = ["top_k"]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Mark exactly the ``k`` largest scores; among equal scores the earlier position wins.

    Args:
        scores: any shape, no NaN.
        k: from 0 to ``scores.numel()``.

    >>> top_k(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    flat = scores.reshape(-1)
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    smallest_kept = flat.kthvalue(flat.numel() - k + 1).values
    mask = flat > smallest_kept
    ties = (flat == smallest_kept).nonzero().squeeze(1)
    mask[ties[: k - int(mask.sum())]] = True
    return mask.view(scores.shape)
