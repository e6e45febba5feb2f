"""Operations of a training step and of inference, dense and sparse.

They are theoretical: a dense layer's times the share of weights that are not zero. Hardware saves them only if it skips
zeros, which masked training does not.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_sparse.compat.torch_private import TorchDispatchMode, operation, storage_identity
from lightning_sparse.layers.sparse import sparse_layers

__all__ = ["OTHER", "Average", "Flops", "dense_flops", "inference", "training"]

#: key of the operations that no weight takes part in, such as attention's products of activations
OTHER = ""


@dataclass(frozen=True)
class Flops:
    """Dense floating-point operations of one weight on one batch; a multiplication and an addition count as two.

    Attributes:
        forward: of the forward pass.
        input_gradient: of the gradient that is passed on to the layer's input; 0 for a layer that reads the data.
        weight_gradient: of the gradient of the weight.
    """

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0


def dense_flops(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Flops]:
    """Count the operations of one forward and backward pass of a dense ``module``, by name of weight.

    What really runs is counted, with the formulas of torch's ``FlopCounterMode`` and some that it lacks: so the first
    layer has no input gradient. Fused attention counts the products of the plain one: two forward, four backward. A
    bilinear layer counts two operations for each weight and example, an embedding bag of sums or means two for each
    number that it adds up. Sparse layers count as the dense ones that they stand for. Gradients are left alone;
    buffers, such as batch statistics, move as in any training step.

    Args:
        module: the module that ``loss`` calls, not compiled.
        loss: runs the forward pass on a batch and returns the scalar loss. Module and batch may be on the meta
            device, where nothing is computed or stored.

    Returns:
        the operations of each parameter that a product, convolution or bag reads; under ``OTHER``, those of no
        parameter.

    Example:
        >>> import torch
        >>> from lightning_sparse.accounting.flops import dense_flops
        >>> net, x = torch.nn.Linear(100, 10), torch.ones(8, 100)
        >>> dense_flops(net, lambda: net(x).sum())
        {'weight': Flops(forward=16000, input_gradient=0, weight_gradient=16000)}
    """
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim > 1}
    with _plain_kernels(), _sparse_layers(module) as sparse:
        operands = _Operands(weights)
        with _Counter(operands) as forward, torch.enable_grad():
            value = loss()
        with _Counter(operands) as backward:
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            torch.autograd.grad(value, trainable, allow_unused=True)
    result = dict(sparse)
    for name, count in forward.counts.items():
        if name != OTHER:
            result[name] = Flops(count, backward.counts[name], count if weights[name].requires_grad else 0)
    # a product that makes a weight's gradient has no weight among its operands: the rest is of activations alone
    made = {name for name in forward.counts if name != OTHER and weights[name].requires_grad}
    own = sum(forward.counts[name] - forward.apart[name] for name in made)
    rest = backward.counts[OTHER] - own
    if forward.counts[OTHER] or rest:
        result[OTHER] = Flops(forward.counts[OTHER], rest)
    return result


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off fused kernels: those of recurrent and of whole transformer layers hide their products."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _sparse_layers(module: nn.Module) -> Iterator[dict[str, Flops]]:
    """Count, by name of weight, what the calls of sparse layers would cost in dense ones."""
    counts: dict[str, Flops] = {}

    def called(name: str, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        count, before = 2 * output.numel() * math.prod(layer.shape[1:]), counts.get(name, Flops())
        counts[name] = Flops(
            before.forward + count,
            before.input_gradient + count * x.requires_grad,
            before.weight_gradient + count * layer.values.requires_grad,
        )

    handles = [
        layer.register_forward_hook(partial(called, f"{prefix}.weight" if prefix else "weight"), with_kwargs=True)
        for prefix, layer in sparse_layers(module).items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class _Operands:
    """Knows weights by where their views are stored, and their copies, such as autocast makes in another dtype."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._places: list[tuple[int, int, int, str]] = []
        self._kept: list[Tensor] = []  # no other tensor may come to lie where a copy was
        for name, tensor in weights.items():
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor for the weight of that name."""
        self._places.append((*_place(tensor), tensor.numel() * tensor.element_size(), name))
        self._kept.append(tensor)

    def name(self, arg: object) -> str | None:
        """Return the weight that ``arg`` is a view of."""
        if not isinstance(arg, Tensor):
            return None
        storage, offset = _place(arg)
        found = (name for whole, start, size, name in self._places if whole == storage and 0 <= offset - start < size)
        return next(found, None)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """``Q K.T`` and the product with ``V``; the heads of the query count."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two products for each one forward; those that a kernel repeats to save memory do not count."""
    return 2 * _attention(query, key, value)


def _trilinear(
    first: Tensor,
    weight: Tensor,
    second: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """A multiplication and an addition for each element of the three tensors' product before it is summed."""
    shapes = []
    for x, expand in ((first, expand1), (weight, expand2), (second, expand3)):
        shape = list(x.shape)
        for dim in sorted(expand):
            shape.insert(dim, 1)
        shapes.append(shape)
    sizes: list[int] = [max(dims) for dims in zip(*shapes, strict=True)]
    return 2 * math.prod(sizes)


def _bag(weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> int:
    """A multiplication and an addition for each number read; the largest, mode 2, is found without."""
    mode = args[2] if len(args) > 2 else kwargs.get("mode", 0)  # after offsets and scale_grad_by_freq
    return 0 if mode == 2 else 2 * indices.numel() * weight.shape[1]


def _vectors(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """A matrix, or a vector, times a vector."""
    return 2 * a.numel()


_ATEN = torch.ops.aten
_FUSED = "_scaled_dot_product"
_FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(_ATEN, name + suffix): formula
    for name in (
        *(f"{_FUSED}_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
        f"{_FUSED}_flash_attention_for_cpu",
        f"{_FUSED}_fused_attention_overrideable",
    )
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
    if hasattr(_ATEN, name + suffix)
} | {
    _ATEN._trilinear: _trilinear,
    _ATEN._embedding_bag: _bag,
    _ATEN._embedding_bag_forward_only: _bag,
    _ATEN.mv: _vectors,
    _ATEN.dot: _vectors,
    _ATEN.addmv: lambda bias, *args, **kwargs: _vectors(*args, **kwargs),
    _ATEN._addmm_activation: flop_registry[_ATEN.addmm],
}
_COPIES = (_ATEN._to_copy, _ATEN.clone)
# makes the gradients of all operands in one operation, or by something else than a product
_APART = (_ATEN.convolution, _ATEN._embedding_bag, _ATEN._embedding_bag_forward_only)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # __init_subclass__
    """Counts operations under the weight that is among the operands, or under ``OTHER``.

    Attributes:
        counts: by name.
        apart: those of them whose gradients of weights are not counted among ``OTHER`` in the backward pass.
    """

    def __init__(self, operands: _Operands) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands = operands
        self.counts: Counter[str] = Counter()
        self.apart: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        called = operation(func)
        formula = _FORMULAS.get(called) or flop_registry.get(called)
        sparse = any(isinstance(arg, Tensor) and arg.layout != torch.strided for arg in args)  # see _sparse_layers
        if formula is not None and not sparse:
            name = next((found for arg in args if (found := self.operands.name(arg)) is not None), OTHER)
            counted = args
            if called is _ATEN.convolution_backward:
                counted = (*args[:-1], (args[-1][0], False, False))  # of its outputs, the input gradient alone
            count = formula(*counted, **kwargs, out_val=out)
            self.counts[name] += count
            self.apart[name] += count * (called in _APART)
        elif called in _COPIES and not sparse and (copied := self.operands.name(args[0])) is not None:
            self.operands.add(copied, out)
        return out


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return which storage a tensor views, and from which byte on: on the meta device there are no addresses."""
    return storage_identity(tensor), int(tensor.storage_offset()) * tensor.element_size()


def inference(flops: Mapping[str, Flops], density: Mapping[str, float]) -> float:
    """Return the operations of a forward pass when each weight keeps its ``density``; those not named are dense.

    >>> inference({"weight": Flops(1000, 0, 1000)}, {"weight": 0.1})
    100.0
    """
    return sum(count.forward * density.get(name, 1.0) for name, count in flops.items())


def training(flops: Mapping[str, Flops], density: Mapping[str, float], gradient_density: Mapping[str, float]) -> float:
    """Return the operations of a training step: forward and input gradient by density, weight gradient by its own.

    >>> training({"weight": Flops(1000, 1000, 1000)}, {"weight": 0.1}, {"weight": 0.5})
    700.0
    """
    return sum(
        (count.forward + count.input_gradient) * density.get(name, 1.0)
        + count.weight_gradient * gradient_density.get(name, 1.0)
        for name, count in flops.items()
    )


@dataclass
class Average:
    """Running average of what changes during training.

    >>> average = Average()
    >>> for density in (1.0, 0.5, 0.3):
    ...     average.add(density)
    >>> round(average.mean, 6)
    0.6
    """

    total: float = 0.0
    count: int = 0

    def add(self, value: float, times: int = 1) -> None:
        """Take one more value into account, or several equal ones."""
        self.total += value * times
        self.count += times

    @property
    def mean(self) -> float:
        """The mean of the values so far."""
        return self.total / self.count
