"""Readouts: what users, loggers and the monitor read of a method."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.shards import whole
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.trainer.mask_files import write_masks

__all__ = ["Readouts"]


class Readouts(ABC):
    """What can be read of a method, before, during and after a fit."""

    #: what is kept of each weight, by parameter name: with the number of its elements, ``size``
    _weights: Mapping[str, Any]

    #: the fit that the method is in
    _fit: Fit

    #: whether the sparsity of each weight is logged
    log_layers: bool

    @property
    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is nonzero: a boolean tensor of the weight's shape, by parameter name.

        Empty before the first fit, at whose start the weights are chosen; readable during it and afterwards.
        """

    def mask(self, name: str) -> Tensor:
        """Return one of ``masks``, without making the others."""
        return self.masks[name]

    def save_masks(self, path: str | os.PathLike[str]) -> None:
        """Write the masks into a file, for ``initial=path`` of another run; all processes call this, the first writes.

        The file is in the format safetensors: a boolean tensor for each weight, by parameter name. It needs the extra
        ``masks``.

        Args:
            path: of the file, ``NAME.safetensors``.

        Raises:
            RuntimeError: the weights have not been chosen yet.
            ValueError: the name ends otherwise.
        """
        if not os.fspath(path).endswith(".safetensors"):
            raise ValueError(f"path must end with .safetensors, got {os.fspath(path)!r}. Rename it.")
        if self.size:
            write_masks({name: whole(mask) for name, mask in self.masks.items()}, path)

    @property
    def layer_count(self) -> dict[str, int]:
        """Number of nonzero weights of each layer, by parameter name; empty before the first fit, as ``masks``."""
        return {name: int(torch.count_nonzero(mask)) for name, mask in self.masks.items()}

    @property
    def layer_density(self) -> dict[str, float]:
        """Share of nonzero weights of each layer, by parameter name; empty before the first fit, as ``masks``."""
        return {name: count / self._weights[name].size for name, count in self.layer_count.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: that of its nonzero ones, unless a method differs."""
        return self.layer_density

    @property
    def density(self) -> float:
        """Share of nonzero weights over all selected weights."""
        return sum(self.layer_count.values()) / self.size

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all selected weights: ``1 - density``."""
        return 1 - self.density

    @property
    def gradient_density(self) -> float:
        """Share of all selected weights whose gradient is used."""
        shares = self.layer_gradient_density
        return sum(share * float(self._weights[name].size) for name, share in shares.items()) / self.size

    @property
    def size(self) -> int:
        """Number of all selected weights.

        Raises:
            RuntimeError: they have not been chosen yet.
        """
        if not self._weights:
            raise RuntimeError(f"{self!r} has no weights yet: they are chosen when trainer.fit starts.")
        return sum(weight.size for weight in self._weights.values())

    @property
    def mask_versions(self) -> dict[str, int]:
        """A number for each weight, another one whenever its mask has changed. Empty: any step may change the masks."""
        return {}

    @property
    def effective_thresholds(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, by parameter name, if the method has thresholds."""
        return {}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """What is kept of each weight: tensors, also those of module and optimizer, and containers of them."""
        return [vars(weight) for weight in self._weights.values()]

    @property
    def extra_metrics(self) -> dict[str, float]:
        """More scalars to log, by name."""
        return {}

    def metrics(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return what is logged.

        Args:
            counts: ``layer_count``, which the caller has at hand.
        """
        layers = counts if self.log_layers else {}
        sparsity = {f"sparsity/{name}": 1 - count / self._weights[name].size for name, count in layers.items()}
        first, *others = self._beside()
        if first is self:  # Lightning would log the mean of what several methods call by one name
            active = sum(counts.values()) + sum(sum(other.layer_count.values()) for other in others)
            size = sum(method.size for method in (first, *others))
            sparsity["sparsity/model"] = 1 - active / size
            sparsity["sparsity/module"] = (size - active) / self._fit.module_size
        return {**sparsity, **self.extra_metrics}

    def _beside(self) -> list["Readouts"]:
        """Return the methods of the Trainer that have weights: this one and those beside it, in order."""
        assert self._fit.trainer is not None
        callbacks = self._fit.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, Readouts) and callback._weights]
