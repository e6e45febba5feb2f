"""One weight of a truly sparse layer while it is trained, and what its gradients are computed from."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat.heap import give_back
from lightning_sparse.kernels.structure import CSR, csr
from lightning_sparse.layers import functional
from lightning_sparse.layers.sparse import SparseLayer, SparseLinear, make_sparse_
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules import select
from lightning_sparse.weights.base import Weight

__all__ = ["Capture", "SparseWeight", "spare"]

_CHUNK = 1 << 22  # bytes of a gradient to compute at once, if one row has not more

_SPARED_FROM = 1 << 18  # nonzeros of a layer, for whose indices it pays to give freed memory back


class SparseWeight(Weight):
    """One weight of which the active connections alone exist; ``parameter`` is the vector of their values.

    Args:
        name: of the dense weight in the LightningModule.
        shape: its shape.
        layer: the layer that holds it, which ``start`` makes sparse; None outside fit.
    """

    def __init__(self, name: str, shape: Sequence[int], layer: nn.Module | None = None) -> None:
        super().__init__(name, layer.values if isinstance(layer, SparseLayer) else None, {})
        self.layer = layer
        #: inputs and output gradients of the calls that make up the gradient, if the connections are to be moved
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._reduce: Callable[[Tensor], Tensor] = torch.Tensor.detach
        self._drawn = False
        self._shape = tuple(shape)
        self._positions: Tensor | None = None

    @property
    def sparse(self) -> SparseLayer:
        """The layer that holds the values."""
        assert isinstance(self.layer, SparseLayer)
        return self.layer

    @property
    def known(self) -> bool:
        """The connections are known: from the layer, or from an earlier fit in this process."""
        return self.layer is not None or self._positions is not None

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self._shape

    @property
    def active(self) -> int:  # noqa: D102  (inherited)
        return len(self.positions) if self.layer is None else self.sparse.nnz

    @property
    def connections(self) -> Tensor:  # noqa: D102  (inherited)
        return self.sparse.crow  # whoever holds it to see whether they move does not hold much

    @property
    def places(self) -> Tensor:  # noqa: D102  (inherited)
        if self.layer is not None:
            return self.sparse.positions
        if self._positions is None:
            raise RuntimeError(f"The connections of {self.name} are in the module's part of the checkpoint.")
        return self._positions

    def forget_places(self) -> None:
        """Do nothing: the layer needs them."""

    @property
    def mask(self) -> Tensor:
        """Where the weight is active, of the dense shape: made when asked for, for users alone."""
        marks = torch.zeros(self.size, dtype=torch.bool)
        marks[self.positions] = True
        return marks.view(self.shape)

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.W.abs()

    @property
    def slopes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.abs()

    @property
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that do not exist, for a bound on them is."""
        bound = torch.zeros((), dtype=self._exact, device=self.W.device)
        for h, delta in self.calls:
            if delta.numel():
                peaks = [torch.linalg.vector_norm(x, math.inf, dtype=self._exact) for x in (h, delta)]
                bound += peaks[0] * peaks[1] * (delta.numel() / self.shape[0])
        return super().finite and bool(self._reduce(bound).isfinite())

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return gradients of connections that need not exist, by ascending position, averaged over processes."""
        where = csr(positions.to(self.W.device), self.shape, getattr(self.layer, "groups", 1))
        return self._gradient(where, (len(positions),))

    def free_sample(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        every = torch.arange(0, self.size, stride)
        every = every[~torch.isin(every, self.positions, assume_unique=True)]
        return self.gradient_at(every).abs()

    def steepest(self, n: int, above: float = -1.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        return select.largest(self.free_gradients(), n, above)

    def free_gradients(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``|dP|`` of some rows at a time, computed for them alone, averaged over processes; -1: active.

        Each part is flat and comes after the position where it begins.
        """
        out, width = self.shape[0], math.prod(self.shape[1:])
        positions, ends = self.sparse.positions, self.sparse.crow.tolist()
        at_once = max(1, _CHUNK // (width * self._exact.itemsize))
        for first in range(0, out, at_once):
            last = min(first + at_once, out)
            scores = self._gradient(slice(first, last), (last - first, *self.shape[1:])).abs_().view(-1)
            scores[positions[ends[first] : ends[last]] - first * width] = -1
            yield first * width, scores

    def _gradient(self, where: CSR | slice, shape: Sequence[int]) -> Tensor:
        """Return gradients of some elements or those of some rows, which have this ``shape``."""
        total = torch.zeros(*shape, dtype=self._exact, device=self.W.device)
        for h, delta in self.calls:
            total += _gradient(self.sparse, h, delta, where)
        return self._reduce(total).to(self.W.dtype)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.W.dtype, torch.float32)

    def start(self, positions: Tensor, generator: Generator) -> None:
        """Make the layer sparse, with its own values at ``positions``; one on the meta device has them drawn."""
        assert isinstance(self.layer, (nn.Linear, nn.Conv2d))
        self._drawn = self.layer.weight.is_meta
        self.layer = make_sparse_(self.layer, positions, generator)
        self.parameter = self.layer.values
        spare(self)

    def scale_to_fan_in_(self) -> None:
        """Do as ``Weight.scale_to_fan_in_``, unless the values have been drawn for the actual fan-in."""
        if not self._drawn:
            fan_in = self.sparse.crow.diff()
            factor = (math.prod(self.shape[1:]) / fan_in.clamp(min=1).double()).sqrt()
            self.W.mul_(factor.repeat_interleave(fan_in, output_size=self.active))

    def exchange(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections, as ``Weight.exchange``; values, gradients and optimizer state change their places."""
        if not (len(dropped) or len(grown)):
            return
        assert self.parameter is not None
        assert self.optimizer is not None
        fresh, old = self.W.new_zeros(len(grown)), self.parameter.grad
        grown, new = grown.cpu(), fresh + value
        if (grown[1:] < grown[:-1]).any():  # seldom, and sorting takes long
            grown, order = grown.sort()
            new = new[order.to(new.device)]
        spare(self)
        moved, positions = self._moved(dropped.cpu(), grown)
        spare(self)
        found = self.sparse.structure_at(positions)
        del positions
        spare(self)
        gradient = None
        if old is not None:
            gradient = moved(old, self.gradient_at(grown))
            gradient = old.copy_(gradient) if len(old) == len(gradient) else gradient
        values = moved(self.W, new)
        for key, state in self.optimizer_state():
            self.optimizer.state[self.parameter][key] = moved(state, fresh + self.fresh(key))
        self.sparse.set_structure(found, values)
        self.parameter.grad = gradient
        del found, moved, values
        spare(self)

    def _moved(self, dropped: Tensor, grown: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Return what a vector of the values' order becomes, with elements for the grown, and the new positions."""
        index = torch.int32 if self.size < 2**31 else torch.int64
        held, dropped, grown = (x.to(index) for x in (self.positions, dropped, grown))
        staying = torch.ones(len(held), dtype=torch.bool)
        staying[torch.searchsorted(held, dropped)] = False
        before = torch.searchsorted(held, grown) - torch.searchsorted(dropped, grown)  # of those that stay
        of_grown = before.add_(torch.arange(len(grown)))
        others = torch.ones(len(held) - len(dropped) + len(grown), dtype=torch.bool)
        others[of_grown] = False
        source = torch.empty(len(others), dtype=torch.int32)  # where each comes from, of the held and the grown
        source.masked_scatter_(others, select.positions(staying).int())
        source[of_grown] = torch.arange(len(held), len(held) + len(grown), dtype=torch.int32)
        both = torch.cat((held, grown))
        del held
        positions = both.index_select(0, source)
        of_all = source.to(self.W.device)
        return lambda x, new: torch.cat((x, new.to(x))).index_select(0, of_all), positions.to(self.W.device)

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        self._leave(mask.reshape(-1)[self.places.to(mask.device)])

    def keep_largest(self, count: int) -> None:  # noqa: D102  (inherited)
        self._leave(select.top_k(self.magnitudes, count))

    def _leave(self, staying: Tensor) -> None:
        """Drop the connections that are not marked, in the order of their positions."""
        self.exchange(self.positions[~staying.cpu()], self.positions[:0])

    def keep_zeros(self) -> None:
        """Do nothing: what is not active does not exist."""

    def keep_zero_gradients(self) -> None:
        """Do nothing: what is not active has no gradient."""

    def listen(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make ready for calls; ``reduce`` averages over processes, and takes the loss scale away."""
        self.calls, self._reduce = [], reduce

    def detach(self) -> None:  # noqa: D102  (inherited)
        if isinstance(self.layer, SparseLayer):
            self._positions = self.positions
        self.layer = self.parameter = self.optimizer = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the module's part, which has the connections."""
        return {"shape": torch.tensor(self.shape)}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        positions = self._positions if self.layer is None else self.positions
        return {
            **super().__getstate__(),
            "layer": None,
            "calls": [],
            "_reduce": torch.Tensor.detach,
            "_positions": positions,
        }


class Capture(Hooks):
    """Keeps what enters sparse layers, and the gradients of what leaves them, from now on until ``close``.

    Only the calls that make up the gradients of the layers' values count: not those of validation, of backward passes
    that do not reach these, such as ``torch.autograd.grad``, or of gradients that have been set to None since.

    Args:
        weights: those of sparse layers; their ``calls`` are filled.
        reduce: makes of a gradient computed from the calls the one that the optimizer would see: averaged over
            processes, without the loss scale if a gradient scaler has taken it away.
    """

    def __init__(self, weights: Sequence[Weight], reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._weights = [weight for weight in weights if isinstance(weight, SparseWeight)]
        #: calls by weight and backward pass: passes may run within each other (reentrant checkpoints)
        self._pending: dict[str, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
        for weight in self._weights:
            weight.listen(reduce)
            hook = partial(self._called, weight)
            self._handles.append(weight.sparse.register_forward_hook(hook, with_kwargs=True))
        spare(*self._weights)  # what earlier steps have left, for what will be kept

    def close(self) -> None:
        """Take the hooks away and forget the calls."""
        super().close()
        self._pending = {}
        for weight in self._weights:
            weight.calls = []

    def _called(self, weight: SparseWeight, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        values = layer.values
        if not (self._open and torch.is_grad_enabled() and values.requires_grad):
            return
        if weight.name not in self._pending:  # only now: a frozen parameter takes no hooks
            self._pending[weight.name] = []
            self._handles.append(values.register_hook(partial(self._begin, weight)))
            self._handles.append(values.register_post_accumulate_grad_hook(partial(self._accept, weight)))
        h = (args[0] if args else kwargs["x"]).detach()
        output.register_hook(lambda delta: self._keep(weight, h, delta))  # type: ignore[no-untyped-call]

    def _keep(self, weight: SparseWeight, h: Tensor, delta: Tensor) -> None:
        if self._open:
            self._pending[weight.name].append((_backward_pass(), (h, delta.detach())))

    def _begin(self, weight: SparseWeight, gradient: Tensor) -> None:
        if self._open and weight.sparse.values.grad is None:  # zero_grad has thrown away what there was
            weight.calls = []

    def _accept(self, weight: SparseWeight, values: Tensor) -> None:
        if self._open:
            now, pending = _backward_pass(), self._pending[weight.name]
            weight.calls += [call for then, call in pending if then == now]
            self._pending[weight.name] = [(then, call) for then, call in pending if then != now]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": [], "_pending": {}}


def _backward_pass() -> int:
    """Return a number of the backward pass that is running, which no other has."""
    return torch._C._current_graph_task_id()


def spare(*weights: Weight) -> None:
    """Give freed memory back if there can be much."""
    if any(weight.active >= _SPARED_FROM and weight.W.is_cpu for weight in weights):
        give_back()


def _gradient(layer: SparseLayer, h: Tensor, delta: Tensor, where: CSR | slice) -> Tensor:
    """Return the gradients of some elements of the weight, or of some rows."""
    if isinstance(layer, SparseLinear):
        if isinstance(where, slice):
            return functional.linear_gradient_rows(h, delta, where)
        return functional.linear_gradient(h, delta, where, layer.backend)
    conv: Any = layer
    x, delta = (h, delta) if h.ndim == 4 else (h.unsqueeze(0), delta.unsqueeze(0))
    x, geometry = functional.padded(conv, x)
    if isinstance(where, slice):
        return functional.conv2d_gradient_rows(x, delta, where, conv.shape, geometry, conv.groups)
    return functional.conv2d_gradient(x, delta, where, geometry, conv.backend)
