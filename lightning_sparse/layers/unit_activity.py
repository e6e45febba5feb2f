"""How strongly each unit of a layer takes part: sums at its inputs and outputs, read off a running network by hooks."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_sparse.compat.compiled import Uncompiled, copied
from lightning_sparse.compat.lightning_private import is_redirected
from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.shards import is_sharded, layout, local
from lightning_sparse.compat.torch_private import RunningNorm, padded_sides
from lightning_sparse.layers.selection import NORMS
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.rules.sampling import unit_sums

__all__ = ["Activity", "GradientSketch", "Hooks", "SynapticFlow", "readable", "signed_patches"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_WEIGHT_GRADIENTS: tuple[Callable[..., Tensor], ...] = (conv1d_weight, conv2d_weight, conv3d_weight)

Sums = dict[str, tuple[Tensor, Tensor]]
SumsOf = Callable[[Tensor], Tensor]


def readable(root: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return the layers, by the names of their weights, whose units can be told from a call of the layer.

    They are linear layers and convolutions that alone hold the weight. Recurrent layers, the input projections of
    attention, bilinear layers and tied weights are left out.
    """
    holders: dict[int, int] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    layers = {name: root.get_submodule(name.rpartition(".")[0]) for name in names if name.split(".")[-1] == "weight"}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, SparseLayer) or (isinstance(layer, _LAYERS) and holders.get(id(layer.weight)) == 1)
    }


class Hooks:
    """Hooks that hear nothing once they are closed, and nothing in copies of the module."""

    def __init__(self) -> None:
        self._open = True
        self._handles: list[Any] = []

    def close(self) -> None:
        """Take the hooks away."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": False, "_handles": []}


class Activity(Hooks):
    """Sums of ``|h|`` over what enters a layer and of ``|delta|`` over the gradients of what leaves it.

    For each input and each output unit or channel, over the batch and all further dimensions, from now on until
    ``close``. Calls without gradient, as in validation, do not count.

    Args:
        layers: linear layers and convolutions, by any name.

    Attributes:
        calls: the number of calls of each layer.
    """

    #: the inputs of convolutions are told apart by their place in the kernel, too
    by_kernel = False

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self._sums = {name: self._zeros(layer) for name, layer in layers.items()}
        self.calls = dict.fromkeys(layers, 0)
        for name, layer in layers.items():
            called, first = partial(self._called, name), is_sharded(_weight(layer))  # before DTensors become plain
            self._handles.append(layer.register_forward_hook(called, with_kwargs=True, prepend=first))

    def sums(self) -> Sums:
        """Return the sums over inputs and over outputs by name; zeros for layers that were not called."""
        return self._sums

    def _called(self, name: str, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._open and torch.is_grad_enabled() and _weight(layer).requires_grad and output.requires_grad:
            self.calls[name] += 1
            of_inputs, of_outputs = self._sums_of_call(layer, local(output))
            self._add(name, 0, of_inputs, args[0] if args else kwargs["input"])
            output.register_hook(partial(self._add, name, 1, of_outputs))  # type: ignore[no-untyped-call]

    def _sums_of_call(self, layer: Any, output: Tensor) -> tuple[SumsOf, SumsOf]:
        """Return what makes sums of the input of a call, and of the gradient of its output."""
        units = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        return (partial(unit_sums, dim=units),) * 2

    @torch.no_grad()
    def _add(self, name: str, end: int, sums_of: SumsOf, x: Tensor) -> None:
        if not self._open:
            return
        sums = self._sums[name][end]
        if is_sharded(x):  # a linear layer under tensor parallelism
            units = layout(x).ranges[-1]
            sums = sums[units.start : units.stop]
        sums.add_(sums_of(local(x)))

    @staticmethod
    def _zeros(layer: Any) -> tuple[Tensor, Tensor]:
        """Return a 0 for each input and each output."""
        weight = _weight(layer)
        outputs, per_group = (layer if isinstance(layer, SparseLayer) else weight).shape[:2]
        inputs, dtype = per_group * getattr(layer, "groups", 1), torch.promote_types(weight.dtype, torch.float32)
        zeros = partial(torch.zeros, dtype=dtype, device=weight.device)  # no DTensors
        return zeros(inputs), zeros(outputs)


class GradientSketch(Activity):
    """Sums of ``r h`` and of ``r delta``, with a random sign ``r`` for each sample (and place, of a convolution).

    The weight's gradient is ``sum delta h`` over all samples and places. The product of the two sums, with the same
    signs, is just that on average: signs of different samples cancel (an AMS sketch; GraEst in guided stochastic
    exploration).

    Args:
        layers: linear layers and convolutions, by any name.
        seed: of the signs; a different one on each process.
    """

    by_kernel = True

    def __init__(self, layers: Mapping[str, Any], seed: int) -> None:
        super().__init__(layers)
        self._generator = torch.Generator().manual_seed(seed)

    def _sums_of_call(self, layer: Any, output: Tensor) -> tuple[SumsOf, SumsOf]:
        if isinstance(layer, nn.Linear):
            return (partial(_signed_rows, self._signs(output.shape[:-1], output)),) * 2
        places = output.shape[-len(layer.kernel_size) :]
        images = output.numel() // math.prod((layer.out_channels, *places))
        r = self._signs((images, 1, *places), output)
        return partial(signed_patches, layer, r), partial(_signed_channels, r)

    def _signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return 1 or -1 at each place, on the device of ``like`` and in single precision at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.randint(2, tuple(shape), generator=self._generator).mul_(2).sub_(1).to(like.device, dtype)

    @staticmethod
    def _zeros(layer: Any) -> tuple[Tensor, Tensor]:
        inputs, outputs = Activity._zeros(layer)
        return inputs.repeat_interleave(math.prod(getattr(layer, "kernel_size", ()))), outputs


class SynapticFlow(Hooks):
    """The flow of ones through ``|W|`` in place of ``W``, from the input to each unit and from each unit to the output.

    The network is the outermost module called that holds all the weights. Its first call is remembered, and repeated
    once by ``sums`` on a copy in evaluation mode and double precision, with ones in place of all real numbers; the
    derivative of the sum of its outputs is the flow from each unit on. Biases and running means count as 0, and norms
    without running statistics are passed over: they are not linear even among positive numbers.

    Args:
        root: a module.
        names: of its weights.

    Attributes:
        calls: the number of calls of each readable layer, after ``sums``.
    """

    by_kernel = False

    def __init__(self, root: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._layers = readable(root, names)
        self._call: tuple[nn.Module, Any, Any] | None = None
        self.calls = dict.fromkeys(self._layers, 0)
        for module in _around(root, names):
            self._handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True))

    def sums(self) -> Sums:
        """Return the flows over inputs and over outputs by name; zeros if the network was not called."""
        self.close()
        network, args, kwargs = self._call or (nn.Identity(), (torch.ones(1),), {})
        network, layers = copied((network, self._layers), network)
        devices = {parameter.device for parameter in _positive(network).parameters()}
        activity = Activity(layers)
        with (
            torch.enable_grad(),
            torch.random.fork_rng([device for device in devices if device.type == "cuda"]),
            closing(Uncompiled()),
            torch.backends.cudnn.flags(enabled=False),  # whose recurrent layers have no backward in evaluation mode
        ):
            outputs = network(*_map(args, _ones), **_map(kwargs, _ones))
            flow = [output.sum() for output in tensors(outputs) if output.requires_grad]
            torch.autograd.backward(flow)
        self.calls = activity.calls
        return activity.sums()

    def _called(self, module: Any, args: Any, kwargs: Any) -> None:
        if self._open and self._call is None and torch.is_grad_enabled() and not is_redirected(module):
            self._call = module, _map(args, Tensor.detach), _map(kwargs, Tensor.detach)


def _around(root: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the modules that hold all parameters of these names, from ``root`` inwards."""
    modules = [root]
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        modules.append(modules[-1].get_submodule(parts[0]))
    return modules


def _signed_rows(r: Tensor, x: Tensor) -> Tensor:
    """Return the sum of the rows of ``x`` times ``r``."""
    return r.reshape(-1) @ x.reshape(-1, x.shape[-1]).to(r.dtype)


def _signed_channels(r: Tensor, delta: Tensor) -> Tensor:
    """Return the sum, for each channel, of what a convolution puts out times ``r``."""
    return (r * delta.reshape(len(r), -1, *r.shape[2:])).sum((0, *range(2, r.ndim)))


def signed_patches(conv: Any, r: Tensor, x: Tensor) -> Tensor:
    """Return the sum of what a convolution multiplies with each weight of a filter, times ``r`` of the output.

    Args:
        conv: of any number of dimensions.
        r: a number for each image and place of the output, ``(images, 1, *places)``.
        x: the input.

    Returns:
        A vector that runs over all input channels, and within each over the places of the kernel.
    """
    x = x.reshape(len(r), -1, *x.shape[-len(conv.kernel_size) :]).to(r.dtype)
    padding: Any = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = nn.functional.pad(x, padded_sides(conv), mode=mode), 0
    gradient = _WEIGHT_GRADIENTS[len(conv.kernel_size) - 1]
    return gradient(x, (1, x.shape[1], *conv.kernel_size), r, conv.stride, padding, conv.dilation).view(-1)


def _weight(layer: Any) -> Tensor:
    """Return the weight, or the nonzeros of a sparse layer."""
    weight: Tensor = layer.values if isinstance(layer, SparseLayer) else layer.weight
    return weight


@torch.no_grad()
def _positive(network: nn.Module) -> nn.Module:
    """Make a network linear among positive numbers, as far as its own nonlinearities are; in place."""
    for module in network.eval().double().modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(torch.zeros_like(parameter) if "bias" in name else parameter.abs())
        if isinstance(module, RunningNorm) and module.running_mean is not None:
            module.running_mean.zero_()
        elif isinstance(module, NORMS):
            module.register_forward_hook(lambda module, args, output: args[0])
    return network


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to all tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_map(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
