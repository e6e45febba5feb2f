"""Criteria: what connections are scored by. The least score is dropped; each is in the order of active connections."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_sparse.rules.matrices import Outputs

__all__ = ["Connections", "magnitude", "magnitude_and_gradient", "mean_momentum", "relative_importance"]


class Connections(Protocol):
    """What criteria and patterns ask of a weight; see :class:`~lightning_sparse.weights.base.Weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    def size(self) -> int:
        """Number of connections there might be."""

    @property
    def outputs(self) -> Outputs:
        """Where the layer's outputs lie."""

    @property
    def part(self) -> Any:
        """What is here of the weight: ``Whole`` or ``Shard`` of :mod:`~lightning_sparse.rules.parts`."""

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

    def gradient_parts(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``|dP|`` of some rows at a time, -1 where active, after the position where these begin."""

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the ``n`` inactive ones of largest ``|dP|`` and these."""


def magnitude(weight: Connections) -> Tensor:
    """Return ``|W|``."""
    return weight.magnitudes


def magnitude_and_gradient(weight: Connections, gradient_weight: float) -> Tensor:
    """Return ``|W| + lambda |dP|`` (MEST, Sec. 3)."""
    return weight.magnitudes + gradient_weight * weight.gradient_magnitudes


def relative_importance(weight: Connections) -> Tensor:
    """Return ``|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|``, with sums over outputs i and inputs j (CHTs, Eq. 1).

    Outputs lie along the first dimension of a weight, and inputs along the second. Sums are taken in double precision
    and on the CPU, the same on all processes.
    """
    out, inputs, *kernel = weight.shape
    magnitudes, places = weight.magnitudes.cpu().double(), weight.active_indices.cpu()
    of_input = places // math.prod(kernel) % inputs
    of_output = places // (inputs * math.prod(kernel))
    ends = (of_input, inputs), (of_output, out)
    sums = (torch.bincount(end, magnitudes, minlength=size)[end] for end, size in ends)
    shares = [magnitudes / total.clamp(min=torch.finfo(torch.double).tiny) for total in sums]
    return sum(shares[1:], shares[0]).to(weight.magnitudes)


def mean_momentum(momentum: Tensor, mask: Tensor) -> float:
    """Return the mean ``|momentum|`` over active weights, a layer's claim to connections (SNFS); 0 if there are none.

    >>> import torch
    >>> mean_momentum(torch.tensor([1.0, -3.0, 8.0]), torch.tensor([True, True, False]))
    2.0
    """
    active = momentum[mask]
    return float(active.abs().mean()) if len(active) else 0.0
