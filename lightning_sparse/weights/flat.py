"""Weights laid end to end: one operation serves all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Scratch", "alone", "in_memory_order", "views"]


class Scratch:
    """Memory for a moment, as a context; on a GPU it is taken for that moment alone, as foreach optimizers do.

    Args:
        size: number of elements.
        dtype: of them.
        device: where it is.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._whole = torch.empty(size, dtype=dtype, device=device)
        self._bytes = self._whole.untyped_storage().nbytes()
        self.__exit__()

    def of(self, size: int) -> Tensor:
        """Return a vector of the first ``size`` elements, which has memory in the context alone."""
        return self._whole[:size]

    def __enter__(self) -> None:
        if not self._whole.is_cpu:
            self._whole.untyped_storage().resize_(self._bytes)

    def __exit__(self, *error: object) -> None:
        if not self._whole.is_cpu:
            self._whole.untyped_storage().resize_(0)


def alone(x: Tensor) -> Tensor:
    """Return a tensor that shares its memory with no others: itself, unless it is a part of a longer one."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def in_memory_order(x: Tensor) -> Tensor:
    """Return a dense tensor as a vector, a view of it."""
    return x.as_strided((x.numel(),), (1,))


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Divide ``flat`` into tensors of the same shapes and orders of memory as those given."""
    found, start = [], 0
    for t in like:
        found.append(flat.as_strided(t.shape, t.stride(), start))
        start += t.numel()
    return found
