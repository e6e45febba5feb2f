"""LatentReadouts: what users read of methods with latent weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lightning_sparse.rules import select
from lightning_sparse.rules.parts import together
from lightning_sparse.trainer.readouts import Readouts
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["LatentReadouts"]


class LatentReadouts(Readouts, ABC):
    """What can be read of a method with latent weights.

    Of a weight that is divided over processes, tensors are DTensors: ``full_tensor()``, called on all of them, returns
    the whole. Numbers are those of the whole weight; all processes ask for them together.
    """

    _weights: dict[str, LatentWeight]

    @abstractmethod
    def nonzero(self, weight: LatentWeight) -> Tensor:
        """Return where a weight is nonzero, of what is here of it."""

    @property
    def latents(self) -> dict[str, Tensor]:
        """The dense latent weights ``W`` by parameter name."""
        return {name: weight.part.joined(weight.latent.detach()) for name, weight in self._weights.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is nonzero: a boolean tensor of the weight's shape, by parameter name."""
        return {name: self.mask(name) for name in self._weights}

    def mask(self, name: str) -> Tensor:
        """Return one of ``masks``, without making the others."""
        weight = self._weights[name]
        return weight.part.joined(self.nonzero(weight))

    @property
    def layer_count(self) -> dict[str, int]:
        """Number of nonzero weights of each layer, by parameter name."""
        return self.ones({name: self.nonzero(weight) for name, weight in self._weights.items()})

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: what it costs where sparsity is exploited."""
        frozen = {name: weight.frozen for name, weight in self._weights.items() if weight.frozen is not None}
        return dict.fromkeys(self._weights, 1.0) | self.densities(frozen)

    def ones(self, masks: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of ones of weights, by name, from masks of what is here."""
        part = together([*self._weights.values()])
        return dict(zip(masks, part.total(*(select.count(mask) for mask in masks.values())), strict=True))

    def densities(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the share of ones of weights, likewise."""
        return {name: count / self._weights[name].size for name, count in self.ones(masks).items()}
