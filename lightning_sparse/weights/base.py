"""What MaskedCallback keeps of each weight, whatever holds it, and of all weights of an optimizer together."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.rules import select
from lightning_sparse.rules.matrices import as_matrix, write_matrix

__all__ = ["MaskedWeight", "Pool", "Weight", "all_finite", "finite"]

#: settings of a param group that states begin at, if not at 0: of Rprop and of Adagrad
_BEGINS_AT = {"step_size": "lr", "sum": "initial_accumulator_value"}


class Weight(ABC):
    """One weight that trains sparse: its active connections, what they hold, and how they move.

    Attributes:
        name: the parameter's name in the LightningModule.
        parameter: the module's parameter; None outside fit.
        buffers: further tensors of the weight's shape that belong to the method's state.
        optimizer: the one that trains it; None outside fit.
    """

    def __init__(self, name: str, parameter: nn.Parameter | None, buffers: dict[str, Tensor]) -> None:
        self.name = name
        self.parameter = parameter
        self.buffers = buffers
        self.optimizer: Optimizer | None = None

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
    def active(self) -> int:
        """Number of active connections."""

    @property
    def room(self) -> int:
        """Number of connections that may be grown."""
        return self.size - self.active

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Where the weight is active: boolean, of its shape."""

    @property
    @abstractmethod
    def places(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the weight's device."""

    @property
    def positions(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the CPU."""
        return self.places.cpu()

    @abstractmethod
    def forget_places(self) -> None:
        """Let go of ``places``, if they are held beside the weight, eight bytes a connection, until the next move."""

    @property
    @abstractmethod
    def connections(self) -> Tensor:
        """A tensor that is another object after connections have been moved."""

    # ------------------------------------------------------------------ what they hold

    @property
    def W(self) -> Tensor:
        """The parameter's values."""
        assert self.parameter is not None
        return self.parameter.data

    @property
    def dP(self) -> Tensor:
        """The parameter's gradient; before it is masked, a dense one has values at inactive connections, too."""
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return self.parameter.grad

    @property
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that are not active."""
        return all_finite(self.dP)

    @property
    @abstractmethod
    def magnitudes(self) -> Tensor:
        """``|W|`` of the active connections, in the order of their positions."""

    @property
    @abstractmethod
    def slopes(self) -> Tensor:
        """``|dP|`` of the active connections, in the order of their positions."""

    @abstractmethod
    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return the gradients of some connections, active or not, given by ascending flat positions."""

    @abstractmethod
    def free_sample(self, stride: int) -> Tensor:
        """Return ``|dP|`` of the inactive ones among every ``stride``-th connection."""

    def smallest(self, n: int, scores: Tensor | None = None) -> Tensor:
        """Return the flat positions of the ``n`` active connections of smallest ``|W|``, ascending.

        Args:
            n: how many; of equals the earlier position's.
            scores: what counts instead of ``|W|``, in the order of positions.
        """
        return self.places[select.lowest_positions(self.magnitudes if scores is None else scores, n)]

    @abstractmethod
    def steepest(self, n: int, above: float = -1.0) -> tuple[Tensor, Tensor]:
        """Return the flat positions of the ``n`` inactive connections of largest ``|dP|``, ascending, and these.

        Args:
            n: how many at most; of equals the earlier position's.
            above: only what is larger counts.
        """

    @property
    def group(self) -> dict[str, Any]:
        """The param group that trains the weight."""
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        return next(group for group in groups if any(p is self.parameter for p in group["params"]))

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the optimizer keeps for each element of the parameter, by name: momentum, moments."""
        assert self.optimizer is not None
        assert self.parameter is not None
        for key, state in [*self.optimizer.state.get(self.parameter, {}).items()]:
            if isinstance(state, Tensor) and state.shape == self.parameter.shape:
                yield key, state

    def fresh(self, key: str) -> float:
        """Return what the optimizer's state of this name is for an element that has not been trained."""
        setting = _BEGINS_AT.get(key)
        return float(self.group.get(setting, 0.0)) if setting else 0.0

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
    def exchange(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections: the grown have fresh optimizer state, the others keep theirs.

        Args:
            dropped: flat positions of active connections, ascending.
            grown: flat positions, different, not active before unless dropped.
            value: the values of the grown, or one for all.
        """

    @abstractmethod
    def keep(self, mask: Tensor) -> None:
        """Drop the active connections that ``mask``, boolean, of the weight's shape, leaves out."""

    @abstractmethod
    def keep_largest(self, count: int) -> None:
        """Drop all but the ``count`` connections of largest ``|W|``; of equals the earlier position's stay."""

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


class MaskedWeight(Weight):
    """A dense parameter, which is exactly 0 outside of a mask.

    Args:
        name: the parameter's name in the LightningModule.
        mask: where it is active; exchanged as a whole, never written in place.
        parameter: the module's parameter; None outside fit.
        buffers: see ``Weight``.
        transposed_groups: see ``layers.selection.ParameterChoice``.
    """

    def __init__(
        self,
        name: str,
        mask: Tensor,
        parameter: nn.Parameter | None = None,
        buffers: dict[str, Tensor] | None = None,
        transposed_groups: int = 0,
    ) -> None:
        super().__init__(name, parameter, buffers or {})
        self._mask = mask
        self._transposed_groups = transposed_groups
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def mask(self) -> Tensor:  # noqa: D102  (inherited)
        return self._mask

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return tuple(self.mask.shape)

    @property
    def active(self) -> int:  # noqa: D102  (inherited)
        return select.count(self.mask)

    @property
    def connections(self) -> Tensor:  # noqa: D102  (inherited)
        return self.mask

    @property
    def places(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the weight's device. Found once between moves."""
        if self._places is None or self._places[0] is not self.mask:
            self._places = self.mask, select.positions(self.mask)
        return self._places[1]

    def forget_places(self) -> None:  # noqa: D102  (inherited)
        self._places = None

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.W.reshape(-1).index_select(0, self.places).abs_()

    @property
    def slopes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1).index_select(0, self.places).abs_()

    def gradient_at(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1)[positions.to(self.dP.device)]

    def free_sample(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1)[::stride].abs()[~self.mask.reshape(-1)[::stride]]

    def steepest(self, n: int, above: float = -1.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        likely = select.likely_bound(self.size, n, lambda stride: [self.free_sample(stride)]) if above < 0 else None
        found = self._free_above(above if likely is None else float(likely))
        if likely is not None and len(found) < n:  # the sample was misleading
            found = self._free_above(above)
        slopes = self.dP.reshape(-1)[found].abs()
        if len(found) > n:
            best = select.top_k_positions(slopes, n)
            found, slopes = found[best], slopes[best]
        return found.cpu(), slopes.cpu()

    def _free_above(self, floor: float) -> Tensor:
        """Return the flat positions of the inactive connections whose ``|dP|`` is above ``floor``, ascending."""
        above = self.dP.reshape(-1).abs().gt(floor)
        return select.positions(torch.gt(above, self.mask.reshape(-1), out=above))

    def start(self, positions: Tensor, generator: Generator) -> None:  # noqa: D102  (inherited)
        self._mask = torch.zeros_like(self.mask)  # in the parameter's layout
        select.put_(self.mask, positions.to(self.mask.device), True)

    def scale_to_fan_in_(self) -> None:  # noqa: D102  (inherited)
        rows = as_matrix(self.W, self._transposed_groups)
        fan_in = as_matrix(self.mask, self._transposed_groups).sum(1, keepdim=True).clamp(min=1).double()
        rows.mul_((rows.shape[1] / fan_in).sqrt())
        write_matrix(self.W, rows, self._transposed_groups)

    def exchange(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:  # noqa: D102  (inherited)
        self.forget_places()
        if not (len(dropped) or len(grown)):
            return
        dropped, grown = dropped.to(self.mask.device), grown.to(self.mask.device)
        self._mask = self.mask.clone()
        select.put_(self.mask, dropped, False)
        select.put_(self.mask, grown, True)
        for key, state in self.optimizer_state():
            select.put_(state, dropped, 0.0)
            select.put_(state, grown, self.fresh(key))
        select.put_(self.W, dropped, 0.0)
        select.put_(self.W, grown, value)

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        if not torch.gt(self.mask, mask).any():
            return
        self._mask = self.mask.clone().logical_and_(mask)  # in the parameter's layout
        select.zero_outside_(self.W, self.mask)
        for _, state in self.optimizer_state():
            select.zero_outside_(state, self.mask)

    def keep_largest(self, count: int) -> None:  # noqa: D102  (inherited)
        self.keep(select.top_k(self.W.abs(), count, among=self.mask))

    def keep_zeros(self) -> None:  # noqa: D102  (inherited)
        select.zero_outside_(self.W, self.mask)

    def keep_zero_gradients(self) -> None:  # noqa: D102  (inherited)
        select.zero_outside_(self.dP, self.mask)

    def restore(self, saved: "MaskedWeight") -> None:
        """Have the mask and the buffers of ``saved``, in the parameter's layout and on its device."""
        self._mask = torch.empty_like(self.mask).copy_(saved.mask)
        self.buffers = {
            key: torch.empty_like(self.mask, dtype=buffer.dtype).copy_(buffer) for key, buffer in saved.buffers.items()
        }
        self.keep_zeros()

    def state(self) -> dict[str, Any]:  # noqa: D102  (inherited)
        return {"mask": self.mask, "buffers": dict(self.buffers)}

    def detach(self) -> None:  # noqa: D102  (inherited)
        self.parameter = self.optimizer = self._places = None
        self._mask = self.mask.cpu()
        self.buffers = {key: buffer.cpu() for key, buffer in self.buffers.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_places": None}


@dataclass(eq=False)
class Pool:
    """The weights of one optimizer, among which connections may move, and its clock.

    Attributes:
        weights: in the order of the module.
        step: the number of optimizer steps so far.
        due: the connections are to be moved at the next step with usable gradients.
        moved: connections have been moved in the step that is under way.
        values: further numbers of the method's state.
    """

    weights: list[Weight] = field(default_factory=list)
    step: int = 0
    due: bool = False
    moved: bool = False
    values: dict[str, float] = field(default_factory=dict)

    @property
    def clock(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pool."""
        return {"step": self.step, "due": self.due, "values": dict(self.values)}

    @clock.setter
    def clock(self, clock: Mapping[str, Any]) -> None:
        self.step, self.due, self.values = clock["step"], clock["due"], dict(clock["values"])


def all_finite(x: Tensor) -> bool:
    """Tell whether all elements are finite."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return not x.numel() or all(bool(extreme.isfinite()) for extreme in x.aminmax())


def finite(weights: Sequence[Weight]) -> bool:
    """Tell whether all gradients are finite: AMP skips a step in which they are not."""
    return all(weight.finite for weight in weights)
