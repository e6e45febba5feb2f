"""What sparsity saves: operations, bytes, and what masks look like and how they change. Pure accounting.

Operations are theoretical: a dense layer's times the share of weights that are not zero. Hardware saves them only if it
skips zeros, which masked training does not. Bytes are those that are really held.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_sparse.kernels.bits import pack
from lightning_sparse.layers.sparse import SparseLayer

__all__ = [
    "OTHER",
    "Average",
    "Explored",
    "Flops",
    "cells",
    "churn",
    "dense_flops",
    "empty_inputs",
    "empty_neurons",
    "inference",
    "mask_bits",
    "shrunk_size",
    "spread",
    "stored_bytes",
    "training",
]

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

    What really runs is counted, with the formulas of torch's ``FlopCounterMode``: so the first layer has no input
    gradient. Sparse layers count as the dense ones that they stand for. Gradients are left alone; buffers, such as
    batch statistics, move as in any training step.

    Args:
        module: the module that ``loss`` calls, not compiled.
        loss: runs the forward pass on a batch and returns the scalar loss. Module and batch may be on the meta
            device, where nothing is computed or stored.

    Returns:
        the operations of each parameter that a product or convolution reads; under ``OTHER``, those of no parameter.

    Example:
        >>> import torch
        >>> from lightning_sparse.accounting.ledger import dense_flops
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
    own = sum(f.weight_gradient for n, f in result.items() if n not in backward.convolved and n not in sparse)
    rest = backward.counts[OTHER] - own
    if forward.counts[OTHER] or rest:
        result[OTHER] = Flops(forward.counts[OTHER], rest)
    return result


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off fused kernels: those of recurrent layers hide their products from the counter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


@contextmanager
def _sparse_layers(module: nn.Module) -> Iterator[dict[str, Flops]]:
    """Count, by name of weight, what the calls of sparse layers would cost in dense ones."""
    counts: dict[str, Flops] = {}

    def called(
        name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        assert isinstance(layer, SparseLayer)
        x = args[0] if args else kwargs["x"]
        count, before = 2 * output.numel() * math.prod(layer.shape[1:]), counts.get(name, Flops())
        counts[name] = Flops(
            before.forward + count,
            before.input_gradient + count * x.requires_grad,
            before.weight_gradient + count * layer.values.requires_grad,
        )

    handles = [
        layer.register_forward_hook(partial(called, f"{prefix}.weight" if prefix else "weight"), with_kwargs=True)
        for prefix, layer in module.named_modules()
        if isinstance(layer, SparseLayer)
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


_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # __init_subclass__
    """Counts operations under the weight that is among the operands, or under ``OTHER``."""

    def __init__(self, operands: _Operands) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands = operands
        self.counts: Counter[str] = Counter()
        self.convolved: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        sparse = any(isinstance(arg, Tensor) and arg.layout != torch.strided for arg in args)  # see _sparse_layers
        if formula is not None and not sparse:
            name = next((found for arg in args if (found := self.operands.name(arg)) is not None), OTHER)
            counted = args
            if func._overloadpacket is torch.ops.aten.convolution_backward:
                counted = (*args[:-1], (args[-1][0], False, False))  # of its outputs, the input gradient alone
                self.convolved.add(name)
            self.counts[name] += formula(*counted, **kwargs, out_val=out)
        elif func._overloadpacket in _COPIES and not sparse and (copied := self.operands.name(args[0])) is not None:
            self.operands.add(copied, out)
        return out


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return which storage a tensor views, and from which byte on: on the meta device there are no addresses."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


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


def empty_neurons(mask: Tensor) -> int:
    """Return how many outputs (neurons, filters) of a layer have no weight left.

    Args:
        mask: where the weight is active, ``(out, in, ...)``.

    >>> empty_neurons(torch.tensor([[True, False, True], [False, False, False]]))
    1
    """
    return int((~mask.flatten(1).any(1)).sum())


def empty_inputs(mask: Tensor, groups: int = 1) -> int:
    """Return how many inputs (features, channels) of a layer no weight reads.

    Args:
        mask: where the weight is active, ``(out, in / groups, ...)``.
        groups: of a convolution.

    >>> empty_inputs(torch.tensor([[True, False, True], [False, False, False]]))
    1
    """
    return int((~mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3).any(1)).sum())


def shrunk_size(mask: Tensor, groups: int = 1) -> int:
    """Return the size of a layer's dense weight without its empty outputs and inputs (GGR, Table 4).

    Args:
        mask: where the weight is active, ``(out, in / groups, ...)``, or of a transposed convolution the converse.
        groups: of a convolution; each loses its own.

    >>> shrunk_size(torch.tensor([[True, False, True], [False, False, False]]))
    2
    """
    touched = mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3)
    return int((touched.any(2).sum(1) * touched.any(1).sum(1)).sum()) * math.prod(mask.shape[2:])


# ---------------------------------------------------------------------- how masks look


def cells(matrix: Tensor, most: int = 128) -> Tensor:
    """Return a picture of a mask: its density in each cell of a grid, on the CPU.

    Args:
        matrix: boolean, ``(out, n)``.
        most: the grid has at most so many rows and columns; smaller matrices have a cell an element.

    >>> cells(torch.tensor([[True, False, True, True], [False, False, False, True]]), most=2)
    tensor([[0.5000, 1.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    rows, columns = (_edges(size, most) for size in matrix.shape)
    band = max(1, (1 << 20) // matrix.shape[1])  # rows at once: numbers take four times the memory of the mask
    by_column = torch.cat([_sums(part, columns, dim=1) for part in torch.split(matrix, band)])
    counts = _sums(by_column, rows, dim=0).double().cpu()
    area = torch.tensor(rows).diff().unsqueeze(1) * torch.tensor(columns).diff()
    return counts / area


def _sums(x: Tensor, edges: list[int], dim: int) -> Tensor:
    """Return the sums of ``x`` between each two of ``edges`` along ``dim``."""
    ends = torch.tensor(edges[1:], device=x.device) - 1
    sums = x.cumsum(dim, dtype=torch.int32).index_select(dim, ends)
    return sums.diff(dim=dim, prepend=torch.zeros_like(sums.narrow(dim, 0, 1)))


def _edges(size: int, most: int) -> list[int]:
    """Divide ``size`` into at most ``most`` nearly equal parts."""
    count = min(size, most)
    return [index * size // count for index in range(count + 1)]


def spread(values: Tensor, bins: int = 20) -> dict[str, Any]:
    """Return minimum, mean, maximum and a histogram of some numbers: ``counts`` between ``edges``.

    >>> spread(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=2)
    {'min': 0.0, 'mean': 1.5, 'max': 4.0, 'counts': [3, 1], 'edges': [0.0, 2.0, 4.0]}
    """
    values = values.detach().reshape(-1).double().cpu()
    low, high = float(values.min()), float(values.max())
    bins = bins if low < high else 1
    counts = [int(n) for n in torch.histc(values, bins, low, high).tolist()]
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]
    return {"min": low, "mean": float(values.mean()), "max": high, "counts": counts, "edges": edges}


# ---------------------------------------------------------------------- how masks change


def mask_bits(mask: Tensor) -> Tensor:
    """Return a mask as bits in the order of its elements, on the CPU: uint8, ``(ceil(size / 8),)``."""
    return pack(mask.reshape(1, -1)).squeeze(0).cpu()


def _ones(bits: Tensor) -> int:
    """Return the number of ones among bits."""
    return int(torch.bincount(bits, minlength=256) @ torch.tensor([byte.bit_count() for byte in range(256)]))


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return how far masks have changed: the share of connections that are in one of two, not both.

    ``|A xor B| / (|A| + |B|)`` over all weights: 0 for equal masks, 1 for disjoint ones, and with a fixed budget the
    share of connections that were exchanged.

    Args:
        before: bits by name, from ``mask_bits``.
        after: the same later.

    >>> before, after = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    >>> churn({"weight": mask_bits(before)}, {"weight": mask_bits(after)})
    0.5
    """
    different = sum(_ones(before[name] ^ bits) for name, bits in after.items())
    both = sum(_ones(before[name]) + _ones(bits) for name, bits in after.items())
    return different / both if both else 0.0


@dataclass
class Explored:
    """Which connections have been active at any time, a bit each; their share is ITOP's exploration rate R_s.

    >>> explored = Explored()
    >>> for mask in ([True, False, False, False], [False, True, False, False]):
    ...     _ = explored.add("weight", torch.tensor(mask))
    >>> explored.rate(["weight"])
    0.5
    """

    bits: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, positions: Tensor, size: int) -> None:
        """Begin anew: of the ``size`` connections of the weight ``name``, those at flat ``positions`` are active."""
        self.bits[name], self.sizes[name] = torch.zeros((size + 7) // 8, dtype=torch.uint8), size
        self.mark(name, positions)

    def mark(self, name: str, positions: Tensor) -> None:
        """See more active connections of the weight ``name``, by their flat positions, all different."""
        bits, byte, place = self.bits[name], positions >> 3, positions & 7
        new = bits[byte] >> place & 1 == 0
        self.bits[name] = bits.index_add(0, byte[new], (1 << place[new]).to(torch.uint8))  # a sum of different bits

    def add(self, name: str, mask: Tensor) -> Tensor:
        """See a mask of the weight ``name``, and return its bits."""
        bits = mask_bits(mask)
        self.bits[name] = self.bits[name] | bits if name in self.bits else bits
        self.sizes[name] = mask.numel()
        return bits

    def keep(self, names: Collection[str]) -> None:
        """Forget all weights but ``names``."""
        self.bits = {name: bits for name, bits in self.bits.items() if name in names}
        self.sizes = {name: size for name, size in self.sizes.items() if name in names}

    def rate(self, names: Iterable[str]) -> float:
        """Return the share of the weights ``names`` that have been active at any time."""
        names = list(names)
        return sum(_ones(self.bits[name]) for name in names) / sum(self.sizes[name] for name in names)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"bits": dict(self.bits), "sizes": dict(self.sizes)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self.bits = {name: bits.cpu() for name, bits in state_dict["bits"].items()}
        self.sizes = dict(state_dict["sizes"])


# ---------------------------------------------------------------------- bytes


def stored_bytes(module: nn.Module, optimizers: Sequence[Optimizer], method: object = None) -> dict[str, int]:
    """Return the bytes of training's tensors as they are stored, each memory counted once.

    Args:
        module: the one that is trained, dense or with sparse layers.
        optimizers: of its parameters.
        method: what else holds tensors: lists and dictionaries, nested, such as ``SparseCallback.held``.

    Returns:
        ``weights``: of all parameters; ``buffers``: the module's, with the indices of sparse layers; ``gradients``:
        of the parameters that train, whether they are allocated now or not; ``optimizer_state``; ``method``: masks,
        latent weights and the like.

    >>> net = nn.Linear(3, 2)
    >>> stored_bytes(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
    {'weights': 32, 'buffers': 0, 'gradients': 32, 'optimizer_state': 0, 'method': 0}
    """
    seen: set[int] = set()
    parameters = list(module.parameters())
    weights = _new_bytes(parameters, seen)
    buffers = _new_bytes(list(module.buffers()), seen)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    seen.update(_storage(p.grad) for p in parameters if p.grad is not None)
    state = _new_bytes([optimizer.state for optimizer in optimizers], seen)
    return {
        "weights": weights,
        "buffers": buffers,
        "gradients": gradients,
        "optimizer_state": state,
        "method": _new_bytes(method, seen),
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _new_bytes(thing: object, seen: set[int]) -> int:
    """Return the bytes of the tensors within ``thing`` whose memory is not in ``seen``, and add it there."""
    if isinstance(thing, Tensor):
        if _storage(thing) in seen:
            return 0
        seen.add(_storage(thing))
        return thing.untyped_storage().nbytes()
    if isinstance(thing, Mapping):
        return sum(_new_bytes(part, seen) for part in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(_new_bytes(part, seen) for part in thing)
    return 0
