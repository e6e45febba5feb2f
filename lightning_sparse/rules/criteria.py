"""Criteria: what connections are scored by. The least score is dropped; each is in the order of active connections."""

from typing import Any, Protocol

from torch import Tensor

from lightning_sparse.rules.matrices import Outputs

__all__ = ["Connections", "magnitude", "magnitude_and_gradient", "mean_momentum"]


class Connections(Protocol):
    """What criteria and patterns ask of a weight; see :class:`~lightning_sparse.weights.base.Weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    def size(self) -> int:
        """Number of connections there might be."""

    @property
    def part(self) -> Any:
        """What is here of the weight: ``Whole`` or ``Rows`` of :mod:`~lightning_sparse.rules.parts`."""

    @property
    def num_active(self) -> int:
        """Number of active connections."""

    @property
    def nonempty(self) -> Outputs | None:
        """Where rows lie of which each keeps a connection; None: any may be empty."""

    @property
    def num_inactive(self) -> int:
        """Number of connections that may be grown."""

    @property
    def active_indices(self) -> Tensor:
        """Flat positions of the active ones, ascending."""

    @property
    def magnitudes(self) -> Tensor:
        """``|W|`` of the active ones."""

    @property
    def gradient_magnitudes(self) -> Tensor:
        """``|dP|`` of the active ones."""

    def sample_inactive(self, stride: int) -> Tensor:
        """Return ``|dP|`` of the inactive ones among every ``stride``-th."""

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the ``n`` inactive ones of largest ``|dP|`` and these."""


def magnitude(weight: Connections) -> Tensor:
    """Return ``|W|``."""
    return weight.magnitudes


def magnitude_and_gradient(weight: Connections, gradient_weight: float) -> Tensor:
    """Return ``|W| + lambda |dP|`` (MEST, Sec. 3)."""
    return weight.magnitudes + gradient_weight * weight.gradient_magnitudes


def mean_momentum(momentum: Tensor, mask: Tensor) -> float:
    """Return the mean ``|momentum|`` over active weights, a layer's claim to connections (SNFS); 0 if there are none.

    >>> import torch
    >>> mean_momentum(torch.tensor([1.0, -3.0, 8.0]), torch.tensor([True, True, False]))
    2.0
    """
    active = momentum[mask]
    return float(active.abs().mean()) if len(active) else 0.0
