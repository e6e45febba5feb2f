"""What the gradient of a truly sparse layer is computed from, also where the weight has no connection."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.torch_private import backward_pass
from lightning_sparse.kernels.structure import CSR, csr
from lightning_sparse.layers import functional
from lightning_sparse.layers.sparse import SparseLayer, SparseLinear
from lightning_sparse.layers.unit_activity import Hooks

__all__ = ["Capture", "CapturedGradient"]

_CHUNK = 1 << 22  # bytes of a gradient to compute at once, if one row has not more


class CapturedGradient:
    """The gradient of the dense weight of a sparse layer: any part of it is computed from the layer's calls.

    Attributes:
        calls: inputs and output gradients of the calls that make up the gradient, if the connections are to be moved.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._reduce: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def listen(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make ready for calls; ``reduce`` averages over processes, and takes the loss scale away."""
        self.calls, self._reduce = [], reduce

    def finite(self, layer: SparseLayer) -> bool:
        """Tell whether all elements are finite, since a bound on them is."""
        bound = torch.zeros((), dtype=_exact(layer), device=layer.values.device)
        for h, delta in self.calls:
            if delta.numel():
                peaks = [torch.linalg.vector_norm(x, math.inf, dtype=_exact(layer)) for x in (h, delta)]
                bound += peaks[0] * peaks[1] * (delta.numel() / layer.shape[0])
        return bool(self._reduce(bound).isfinite())

    def at(self, layer: SparseLayer, positions: Tensor) -> Tensor:
        """Return the elements at ascending flat positions, averaged over processes."""
        where = csr(positions.to(layer.values.device), layer.shape, getattr(layer, "groups", 1))
        return self._part(layer, where, (len(positions),))

    def inactive(self, layer: SparseLayer, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the magnitudes of some rows at a time, computed for them alone, averaged over processes; -1: active.

        Each part is flat and comes after the position where it begins; ``positions`` are those of the active ones.
        """
        out, width = layer.shape[0], math.prod(layer.shape[1:])
        ends = layer.crow.tolist()
        at_once = max(1, _CHUNK // (width * _exact(layer).itemsize))
        for first in range(0, out, at_once):
            last = min(first + at_once, out)
            scores = self._part(layer, slice(first, last), (last - first, *layer.shape[1:])).abs_().view(-1)
            scores.index_fill_(0, positions[ends[first] : ends[last]] - first * width, -1)
            yield first * width, scores

    def _part(self, layer: SparseLayer, where: CSR | slice, shape: Sequence[int]) -> Tensor:
        """Return some elements or some rows, which have this ``shape``."""
        parts = (_of_call(layer, h, delta, where) for h, delta in self.calls)
        total = next(parts, None)
        if total is None:
            total = torch.zeros(*shape, dtype=_exact(layer), device=layer.values.device)
        for part in parts:
            total += part
        return self._reduce(total).to(layer.values.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to a step."""
        return {"calls": [], "_reduce": torch.Tensor.detach}


class Capture(Hooks):
    """Keeps what enters sparse layers, and the gradients of what leaves them, from now on until ``close``.

    Only the calls that make up the gradients of the layers' values count: not those of validation, of backward passes
    that do not reach these, such as ``torch.autograd.grad``, or of gradients that have been set to None since.

    Args:
        layers: sparse layers by any name.
        gradients: theirs, by the same names; their ``calls`` are filled.
        reduce: makes of a gradient computed from the calls the one that the optimizer would see: averaged over
            processes, without the loss scale if a gradient scaler has taken it away.
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        gradients: dict[str, CapturedGradient],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self._gradients = gradients
        #: calls by layer and backward pass: passes may run within each other (reentrant checkpoints)
        self._pending: dict[str, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
        for name, layer in layers.items():
            gradients[name].listen(reduce)
            self._handles.append(layer.register_forward_hook(partial(self._called, name), with_kwargs=True))

    def close(self) -> None:
        """Take the hooks away and forget the calls."""
        super().close()
        self._pending = {}
        for gradient in self._gradients.values():
            gradient.calls = []

    def _called(self, name: str, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        values = layer.values
        if not (self._open and torch.is_grad_enabled() and values.requires_grad):
            return
        if name not in self._pending:  # only now: a frozen parameter takes no hooks
            self._pending[name] = []
            self._handles.append(values.register_hook(partial(self._begin, name, values)))
            self._handles.append(values.register_post_accumulate_grad_hook(partial(self._accept, name)))
        h = (args[0] if args else kwargs["input"]).detach()
        output.register_hook(lambda delta: self._keep(name, h, delta))  # type: ignore[no-untyped-call]

    def _keep(self, name: str, h: Tensor, delta: Tensor) -> None:
        if self._open:
            self._pending[name].append((backward_pass(), (h, delta.detach())))

    def _begin(self, name: str, values: Tensor, gradient: Tensor) -> None:
        if self._open and values.grad is None:  # zero_grad has thrown away what there was
            self._gradients[name].calls = []

    def _accept(self, name: str, values: Tensor) -> None:
        if self._open:
            now, pending = backward_pass(), self._pending[name]
            self._gradients[name].calls += [call for then, call in pending if then == now]
            self._pending[name] = [(then, call) for then, call in pending if then != now]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gradients": {}, "_pending": {}}


def _exact(layer: SparseLayer) -> torch.dtype:
    return torch.promote_types(layer.values.dtype, torch.float32)


def _of_call(layer: SparseLayer, h: Tensor, delta: Tensor, where: CSR | slice) -> Tensor:
    """Return the gradients of some elements of the weight, or of some rows."""
    if isinstance(layer, SparseLinear):
        if isinstance(where, slice):
            return functional.linear_gradient_rows(h, delta, where)
        backend = layer.backend if layer.products == "products" else None  # blocks have others
        return functional.linear_gradient(h, delta, where, backend)
    conv: Any = layer
    x, delta = (h, delta) if h.ndim == 4 else (h.unsqueeze(0), delta.unsqueeze(0))
    x, geometry = functional.padded(conv, x)
    if isinstance(where, slice):
        return functional.conv2d_gradient_rows(x, delta, where, conv.shape, geometry, conv.groups)
    return functional.conv2d_gradient(x, delta, where, geometry, conv.backend)
