"""What the gradient of a truly sparse layer is computed from, also where the weight has no connection."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.torch_private import backward_pass
from lightning_sparse.kernels.positions import unmarked
from lightning_sparse.kernels.structure import CSR, csr
from lightning_sparse.layers import functional
from lightning_sparse.layers.sparse import SparseLayer, SparseLinear
from lightning_sparse.layers.unit_activity import Hooks

__all__ = ["Capture", "CapturedGradient"]

_CHUNK = 1 << 20  # bytes of a gradient to compute at once, if one row has not more


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
        for first, active, gradient in self._rows(layer, positions):
            yield first, gradient.abs_().index_fill_(0, active - first, -1)

    def candidates(self, layer: SparseLayer, positions: Tensor) -> Iterator[Callable[[float], tuple[Tensor, Tensor]]]:
        """Yield what tells which inactive ones of some rows are not less than a bound: positions and magnitudes.

        Each is to be called before the next; ``positions`` are those of the active ones.
        """
        for first, active, gradient in self._rows(layer, positions, reuse=True):
            yield partial(_candidates, first, active, gradient)

    def _rows(self, layer: SparseLayer, positions: Tensor, reuse: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield where some rows begin, the active positions in them and the gradient, flat.

        With ``reuse`` the next ones may be in the place of these.
        """
        rows, width = layer.shape[0], math.prod(layer.shape[1:])
        ends = layer.crow.tolist()
        at_once = max(1, _CHUNK // (width * _exact(layer).itemsize))
        out = None
        if reuse and isinstance(layer, SparseLinear) and self.calls:
            dtype = functional.exact_dtype(self.calls[0][1].dtype)
            out = torch.empty(min(at_once, rows), width, dtype=dtype, device=layer.values.device)
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            held = None if out is None else out[: last - first]
            gradient = self._part(layer, slice(first, last), (last - first, *layer.shape[1:]), held).view(-1)
            yield first * width, positions[ends[first] : ends[last]], gradient

    def _part(self, layer: SparseLayer, where: CSR | slice, shape: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Return some elements or some rows, which have this ``shape``; those of a linear layer may be in ``out``."""
        outs = chain([out], repeat(None))
        parts = (_of_call(layer, h, delta, where, held) for (h, delta), held in zip(self.calls, outs, strict=False))
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


def _candidates(first: int, active: Tensor, gradient: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    found, magnitudes = unmarked(gradient, active, first, bound)
    return found.add_(first), magnitudes


def _of_call(layer: SparseLayer, h: Tensor, delta: Tensor, where: CSR | slice, out: Tensor | None = None) -> Tensor:
    """Return the gradients of some elements of the weight, or of some rows."""
    if isinstance(layer, SparseLinear):
        if isinstance(where, slice):
            return functional.linear_gradient_rows(h, delta, where, out)
        backend = layer.backend if layer.products == "products" else None  # blocks have others
        return functional.linear_gradient(h, delta, where, backend)
    conv: Any = layer
    x, delta = (h, delta) if h.ndim == 4 else (h.unsqueeze(0), delta.unsqueeze(0))
    x, geometry = functional.padded(conv, x)
    if isinstance(where, slice):
        return functional.conv2d_gradient_rows(x, delta, where, conv.shape, geometry, conv.groups)
    return functional.conv2d_gradient(x, delta, where, geometry, conv.backend)
