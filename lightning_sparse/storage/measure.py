"""How long a sparse layer takes with each backend: a short measurement with inputs as the training has them."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.compat.compiled import Uncompiled
from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.dispatch import DENSE
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.layers.unit_activity import Hooks

__all__ = ["LAYER_LIMIT", "Input", "Inputs", "backends", "choose", "measure", "measure_all", "ways"]

#: bytes of a layer's dense weight up to which it may compute with it
LAYER_LIMIT = 16 << 20

# of the batch, as many examples as make so many products with the dense weight, but so many at least
_PRODUCTS, _EXAMPLES = 1 << 29, 16
_ROUNDS, _SECONDS = 50, 0.2  # at most, but for the round that is under way
# of the time with a dense weight, what sparse products may take to be chosen: a measurement may be wrong by as much,
# and with dense weights no layer is slower than with masks
_CLEARLY = 0.9

Context = Callable[[], AbstractContextManager[Any]]


class Input(NamedTuple):
    """What is known of a layer's input.

    Attributes:
        shape: of it.
        dtype: of it.
        requires_grad: its gradient is computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Inputs(Hooks):
    """Notes the largest input that each layer is trained with, from now on until ``close``; compiled code waits.

    Attributes:
        found: by the names of ``layers``; those that are not called are missing.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        super().__init__()
        self.found: dict[str, Input] = {}
        self._uncompiled = Uncompiled()
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._note, name), with_kwargs=True))

    def close(self) -> None:
        """Take the hooks away."""
        super().close()
        self._uncompiled.close()

    def remove(self) -> None:
        """Do as ``close``, at the fit's end."""
        self.close()

    def _note(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        if self._open and torch.is_grad_enabled():
            x = args[0] if args else kwargs["input"]
            if name not in self.found or math.prod(self.found[name].shape) < x.numel():
                self.found[name] = Input(tuple(x.shape), x.dtype, x.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "found": {}, "_uncompiled": None}


def backends(layer: SparseLayer) -> list[str]:
    """Return the names of the sparse backends that a layer may have; the first is the quicker one as a rule."""
    dtype = torch.promote_types(layer.values.dtype, torch.float32)
    return list(dispatch.candidates(layer.products, layer.values.device, dtype))


def ways(layer: SparseLayer) -> list[str]:
    """Return how a layer may compute: with a backend, or with a dense weight if that is small enough."""
    dense = math.prod(layer.shape) * layer.values.element_size()
    return [*backends(layer), *([DENSE] if dense <= LAYER_LIMIT else [])]


def choose(layers: Mapping[str, SparseLayer], taken: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Have layers compute as is clearly quickest, and return how.

    Those of which no times are known compute as is quicker as a rule.

    Args:
        layers: by any name.
        taken: seconds by names of layers and ways.
    """
    for name, layer in layers.items():
        times = taken.get(name, {backends(layer)[0]: 0.0})
        layer.backend = min(times, key=lambda way: times[way] * (_CLEARLY if way == DENSE else 1))
    return {name: str(layer.backend) for name, layer in layers.items()}


def measure_all(
    layers: Mapping[str, SparseLayer],
    inputs: Mapping[str, Input],
    names: Callable[[SparseLayer], Iterable[str]],
    context: Context = nullcontext,
) -> dict[str, dict[str, float]]:
    """Return what ``measure`` does for each layer that has an input, measured once for layers of the same kind.

    Args:
        layers: by any name.
        inputs: of some of them.
        names: returns the backends to measure a layer with.
        context: the precision that they are trained in.
    """
    known: dict[object, dict[str, float]] = {}
    found = {}
    for name in inputs:
        kind = _kind(layers[name]), inputs[name]
        if kind not in known:
            known[kind] = measure(layers[name], inputs[name], names(layers[name]), context)
        found[name] = known[kind]
    return found


def measure(layer: SparseLayer, like: Input, names: Iterable[str], context: Context = nullcontext) -> dict[str, float]:
    """Return the seconds of a forward and backward pass of a layer with each backend.

    They are the smallest of up to fifty, taken in turn after one that does not count, in about 0.2 s, with some
    examples of a random batch. Torch's own random numbers, gradients and hooks of the layer are left alone.

    Args:
        layer: to measure.
        like: its input in training.
        names: of the backends.
        context: the precision that it is trained in.
    """
    x = _example(layer, like)
    best, before = dict.fromkeys(names, math.inf), layer.backend
    start = time.perf_counter()
    try:
        for round_ in range(_ROUNDS + 1):
            for name in best:
                layer.backend = name
                taken = seconds(partial(_pass, layer, x, context), 1, x.device)
                best[name] = min(best[name], taken if round_ else math.inf)
            if round_ == 0:
                start = time.perf_counter()  # the first one may compile
            elif time.perf_counter() - start > _SECONDS:
                break
    finally:
        layer.backend = before
    return best


def _kind(layer: SparseLayer) -> tuple[Any, ...]:
    """Return what layers have in common that take as long for the same input."""
    how = [getattr(layer, name, None) for name in ("stride", "padding", "dilation", "groups", "padding_mode")]
    return type(layer), layer.shape, *how, f"{layer.nnz:.1e}", layer.values.dtype, layer.bias is None


def _example(layer: SparseLayer, like: Input) -> Tensor:
    """Return a random input with no more examples than it takes."""
    shape = like.shape
    if len(shape) > (3 if len(layer.shape) == 4 else 1):  # there is a dimension of examples
        places = math.prod(shape[1:]) // (layer.shape[1] * getattr(layer, "groups", 1))
        of_one = max(1, math.prod(layer.shape) * places // math.prod(getattr(layer, "stride", (1,))))
        shape = min(shape[0], max(_EXAMPLES, _PRODUCTS // of_one)), *shape[1:]
    x = torch.rand(shape, generator=Generator().manual_seed(0)).to(layer.values.device, like.dtype)
    return x.requires_grad_(like.requires_grad)


def _pass(layer: SparseLayer, x: Tensor, context: Context) -> None:
    """Compute output and gradients, without hooks and without adding to those that are there."""
    with torch.enable_grad():
        with context():
            y = layer.forward(x)
        wanted = [each for each in (x, *layer.parameters(recurse=False)) if each.requires_grad]
        if wanted:
            torch.autograd.grad(y, wanted, torch.ones_like(y))
