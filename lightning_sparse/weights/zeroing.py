"""Zeroing: the weights of an optimizer are set to 0 outside of their masks together, by a few operations for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.torch_private import copy_each, multiply_each
from lightning_sparse.kernels.bits import INTEGERS
from lightning_sparse.kernels.dispatch import is_fused
from lightning_sparse.rules.select import CHUNK
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.flat import Scratch, in_memory_order, views
from lightning_sparse.weights.masked import MaskedWeight

__all__ = ["Zeroing"]


class Zeroing:
    """Sets weights, and their gradients, to 0 where they are not active.

    On a GPU each operation takes a launch, so all weights are laid end to end and share five operations. On a CPU small
    weights do, as long as they fit into its cache together; large ones are quicker by themselves.
    """

    def __init__(self) -> None:
        self._laid: dict[tuple[int, ...], tuple[list[Weight], list[_Together]]] = {}

    def keep_zeros(self, weights: Sequence[Weight]) -> None:
        """Set to 0 what is not active."""
        alone, together = self._lay(weights)
        for weight in alone:
            weight.keep_zeros()
        for each in together:
            each.keep_zeros()

    def keep_zero_gradients(self, weights: Sequence[Weight]) -> None:
        """Set to 0 the gradients of what is not active; all ``weights`` have one."""
        alone, together = self._lay(weights)
        for weight in alone:
            weight.keep_zero_gradients()
        for each in together:
            each.keep_zero_gradients()

    def _lay(self, weights: Sequence[Weight]) -> tuple[list[Weight], list["_Together"]]:
        """Return the weights that are served by themselves, and those that are together; found once between moves."""
        key = tuple(weight.mask_version for weight in weights)
        if key not in self._laid:
            if len(self._laid) > 1:  # all weights, and those with a gradient, of the present masks
                self._laid.clear()
            self._laid[key] = _divide(weights)
        return self._laid[key]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without weights."""
        return {"_laid": {}}


class _Together:
    """Weights of one device and dtype, whose masks lie end to end.

    Args:
        weights: in the order in which they lie.
        scratch: memory for the values of all of them.
    """

    def __init__(self, weights: Sequence[MaskedWeight], scratch: Scratch) -> None:
        self.weights, self.scratch = weights, scratch
        self.masks = torch.cat([in_memory_order(weight.mask) for weight in weights])
        masks = [weight.mask for weight in weights]
        values = scratch.of(sum(mask.numel() for mask in masks))
        self.bits = values.view(INTEGERS[values.element_size()])
        self.values, self.factors = views(values, masks), views(self.bits, masks)
        self._places: list[int] = []
        self._parameters: list[Tensor] = []

    def keep_zeros(self) -> None:
        """Multiply the bits of the parameters, as integers, by the masks."""
        with self.scratch:
            self.bits.copy_(self.masks)
            multiply_each(self._bits_of_parameters(), self.factors)

    def keep_zero_gradients(self) -> None:
        """Do the same with gradients, which are new at each step: in a copy of all of them."""
        gradients = [weight.dP for weight in self.weights]
        if any(gradient.dtype != self.values[0].dtype for gradient in gradients):
            for weight in self.weights:
                weight.keep_zero_gradients()
            return
        with self.scratch:
            copy_each(self.values, gradients)
            self.bits.mul_(self.masks)
            copy_each(gradients, self.values)

    def _bits_of_parameters(self) -> list[Tensor]:
        """Return views of the parameters as integers, kept as long as these stay where they are."""
        places = [weight.place for weight in self.weights]
        if places != self._places:
            self._places, self._parameters = places, [weight.W.view(self.bits.dtype) for weight in self.weights]
        return self._parameters


def _divide(weights: Sequence[Weight]) -> tuple[list[Weight], list[_Together]]:
    """Return the weights that are served by themselves, and the others, as many together as there may be."""
    alone: list[Weight] = []
    alike: dict[Any, list[list[MaskedWeight]]] = {}
    for weight in weights:
        if not isinstance(weight, MaskedWeight) or not 0 < weight.mask.numel() <= _room(weight):
            alone.append(weight)
            continue
        parts = alike.setdefault((weight.W.device, weight.W.dtype), [[]])
        if sum(each.mask.numel() for each in parts[-1]) + weight.mask.numel() > _room(weight):
            parts.append([])
        parts[-1].append(weight)
    return alone, _together(alike)


def _room(weight: MaskedWeight) -> float:
    """Return how many elements are served together."""
    return float("inf") if is_fused(weight.W.device) else CHUNK


def _together(alike: Mapping[Any, Sequence[Sequence[MaskedWeight]]]) -> list[_Together]:
    found = []
    for (device, dtype), parts in alike.items():
        scratch = Scratch(max(sum(weight.mask.numel() for weight in part) for part in parts), dtype, device)
        found += [_Together(part, scratch) for part in parts]
    return found
