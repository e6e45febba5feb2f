"""Weight: one weight that trains sparse, whatever holds it: it answers questions, and connections move by its orders.

A connection is its flat position in the dense weight.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.optimizers import states, stepping
from lightning_sparse.compat.shards import local
from lightning_sparse.rules import select, ties
from lightning_sparse.rules.matrices import FIRST, Outputs
from lightning_sparse.rules.parts import WHOLE, Whole

__all__ = [
    "Weight",
    "all_finite",
    "elementwise",
    "finite",
    "new_version",
    "optimizer_state",
    "optimizer_states",
    "param_group",
]

_versions = count(1)


class Weight(ABC):
    """One weight that trains sparse: its active connections, what they hold, and how they move.

    Where processes hold a part each (:class:`~lightning_sparse.weights.sharded.ShardedWeight`), numbers and shapes are
    those of the whole weight; connections, and what belongs to them, are those of the part that is here. Then all
    processes must ask and order the same, at the same time.

    Attributes:
        name: the parameter's name in the LightningModule.
        parameter: the module's parameter; None outside fit.
        buffers: further tensors of the weight's shape that belong to the method's state.
        optimizer: the one that trains it; None outside fit.
        mask_version: a number that no other mask has, of this weight or another.
        outputs: where the layer's outputs lie.
        nonempty: where rows lie of which each keeps a connection; None: any may be empty.
        part: what is here of the weight, and how connections are chosen among all parts.
    """

    outputs: Outputs = FIRST
    nonempty: Outputs | None = None
    part: Whole = WHOLE

    def __init__(self, name: str, parameter: nn.Parameter | None, buffers: dict[str, Tensor]) -> None:
        self.name = name
        self.parameter = parameter
        self.buffers = buffers
        self.optimizer: Optimizer | None = None
        self.mask_version = new_version()

    @property
    def whole(self) -> "Weight":
        """The weight itself, of which this one may be a view; see ``weights.units``."""
        return self

    # ------------------------------------------------------------------ which connections

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    def size(self) -> int:
        """Number of connections there might be."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def num_active(self) -> int:
        """Number of active connections."""

    @property
    def num_inactive(self) -> int:
        """Number of connections that may be grown."""
        return self.size - self.num_active

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Where the weight is active: boolean, of its shape; of a part of it, if the others are not here."""

    @property
    @abstractmethod
    def active_indices(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the weight's device."""

    @abstractmethod
    def hold_indices(self) -> None:
        """Keep ``active_indices`` once they are asked for, until they change or are forgotten."""

    @abstractmethod
    def forget_indices(self) -> None:
        """Let go of ``active_indices``, if they are held beside the weight, eight bytes a connection, until asked."""

    # ------------------------------------------------------------------ what they hold

    @property
    @abstractmethod
    def given(self) -> Tensor:
        """The dense weight that the module has, before ``start``; on the meta device if it has none yet."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that are not active."""

    @property
    @abstractmethod
    def magnitudes(self) -> Tensor:
        """``|W|`` of the active connections, in the order of their positions."""

    @property
    @abstractmethod
    def gradient_magnitudes(self) -> Tensor:
        """``|dP|`` of the active connections, in the order of their positions."""

    @abstractmethod
    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return the gradients of some connections, active or not, given by ascending flat positions."""

    @abstractmethod
    def sample_inactive(self, stride: int) -> Tensor:
        """Return ``|dP|`` of the inactive ones among every ``stride``-th connection."""

    @abstractmethod
    def gradient_parts(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``|dP|`` of some rows at a time, -1 where active, after the flat position where these begin.

        The first dimension of each part counts rows of the weight; it may be written into.
        """

    def smallest(self, n: int, scores: Tensor | None = None) -> Tensor:
        """Return the flat positions of the ``n`` active connections of smallest ``|W|``, ascending.

        Args:
            n: how many.
            scores: what counts instead of ``|W|``, in the order of positions.
        """
        scores = self.magnitudes if scores is None else scores
        order = ties.at(self.active_indices, self.shape)
        return self.active_indices.index_select(0, self.part.lowest_positions(scores, n, order=order))

    @abstractmethod
    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the flat positions of the ``n`` inactive connections of largest ``|dP|``, ascending, and these.

        Args:
            n: how many at most.
            at_least: only what is not less counts.
        """

    @property
    def strays(self) -> int:
        """Number of values other than 0 where there is no connection, which only other code can have written."""
        return 0

    @property
    def alike(self) -> bool:
        """There are several active connections, and ``|W|`` is the same for all."""
        return self.part.all_equal(self.magnitudes)

    @property
    def gradients_alike(self) -> bool:
        """There are several active connections, and ``|dP|`` is the same for all."""
        return self.part.all_equal(self.gradient_magnitudes)

    @property
    def diverged(self) -> bool:
        """Some values are NaN or infinite."""
        return self.parameter is not None and not all_finite(self.parameter.data)

    # ------------------------------------------------------------------ how they move

    @abstractmethod
    def start(self, positions: Tensor, generator: Generator) -> None:
        """Have active connections at these flat positions, and no others; ``generator`` is for values not yet drawn."""

    @abstractmethod
    def scale_to_fan_in_(self) -> None:
        """Multiply each neuron's values by the square root of its fan-in over the number of its active connections.

        The initialisation of Evci et al. (2019, "The difficulty of training sparse neural networks") by way of a dense
        one: what standard initialisations divide by the square root of the fan-in is divided by that of the actual one.
        """

    @abstractmethod
    def rewire(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections: the grown have fresh optimizer state (``weights.fresh``), the others keep theirs.

        Args:
            dropped: flat positions of active connections, ascending.
            grown: flat positions, different, not active before unless dropped.
            value: the values of the grown, or one for all.
        """

    @abstractmethod
    def keep(self, mask: Tensor) -> None:
        """Drop the active connections that ``mask``, boolean, of the weight's shape, leaves out."""

    @abstractmethod
    def keep_zeros(self) -> None:
        """Set to 0 what is not active."""

    @abstractmethod
    def keep_zero_gradients(self) -> None:
        """Set to 0 the gradients of what is not active."""

    # ------------------------------------------------------------------ state

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    @abstractmethod
    def detach(self) -> None:
        """Let go of the module and the optimizer; keep the state on the CPU."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        return {**self.__dict__, "parameter": None, "optimizer": None}


def new_version() -> int:
    """Return a number for a mask that no other has in this process."""
    return next(_versions)


def may_be_alike(few: Tensor) -> bool:
    """Tell whether the magnitudes of the first few of many values do not differ yet, before all are looked at."""
    return len(few) < 2 or select.all_equal(few.abs())


def param_group(weight: Weight) -> dict[str, Any]:
    """Return the param group that trains a weight."""
    assert weight.optimizer is not None
    groups = (group for each in stepping(weight.optimizer) for group in each.param_groups)
    return next(group for group in groups if any(p is weight.parameter for p in group["params"]))


def optimizer_state(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """Yield what the optimizer, and each of those within it, keeps for each element of the parameter, by name."""
    for kept in optimizer_states(weight):
        yield from elementwise(kept, weight)


def optimizer_states(weight: Weight) -> list[dict[str, Any]]:
    """Return what the optimizer, and each of those within it, keeps for the parameter."""
    assert weight.optimizer is not None
    assert weight.parameter is not None
    return states(weight.optimizer, weight.parameter)


def elementwise(kept: Mapping[str, Any], weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """Yield what has a number for each element of the parameter: momentum, moments."""
    assert weight.parameter is not None
    for key, state in [*kept.items()]:
        if isinstance(state, Tensor) and state.shape == weight.parameter.shape:
            yield key, local(state)


def all_finite(x: Tensor) -> bool:
    """Tell whether all elements are finite."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return not x.numel() or all(bool(extreme.isfinite()) for extreme in x.aminmax())


def finite(weights: Sequence[Weight]) -> bool:
    """Tell whether all gradients are finite: AMP skips a step in which they are not."""
    return all(weight.finite for weight in weights)
