"""How channels pass through each operation: a rule says what is known of the result, or stops and says why."""

import operator
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_sparse.compat.torch_private import BatchNorm, Convolution, Dropout
from lightning_sparse.export.channels import Channels, Flow, Mixer, Rule

__all__ = ["RULES", "contribution"]

# ---------------------------------------------------------------------- layers with weights


def _mix(channels: Channels, node: fx.Node, module: nn.Linear | Convolution) -> Flow | None:
    """Follow a linear layer or a convolution: new channels, constant where nothing that varies is read."""
    weight = module.weight.detach().cpu()
    axis = len(_shape(node)) - max(weight.ndim - 1, 1)
    source = node.all_input_nodes[0]
    groups = module.groups if isinstance(module, Convolution) else 1
    if groups == weight.shape[0] and weight.shape[1] == 1 and groups > 1:
        return _depthwise(channels, node, module, weight, channels.read(source, axis, len(weight)))
    if groups > 1:
        return channels.stop(node, f"its {groups} groups must stay of equal size")
    x = channels.read(source, axis, weight.shape[1])
    foldable = _foldable(x, module)
    connected = (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0
    constants = x.fixed & ~foldable
    carrier = int(torch.where(constants, x.value.abs(), 0.0).argmax())
    share = torch.where(constants, x.value / x.value[carrier], 0.0)
    if constants.any():
        carried = connected[:, constants].any(1)
        connected[:, constants] = False
        connected[:, carrier] = carried
    value = _bias(module) + contribution(weight, foldable, x.value)
    outputs = Flow(axis, channels.new(len(weight)), ~connected[:, ~foldable].any(1), value)
    channels.mixers.append(Mixer(str(node.target), node, x, outputs, connected, foldable, carrier, share))
    return outputs


def contribution(weight: Tensor, places: Tensor, value: Tensor) -> Tensor:
    """Return what constant inputs at some ``places`` ``(in,)``, of that ``value``, add to each output, in float64."""
    kernel = weight[0, 0].numel()
    return weight[:, places.to(weight.device)].double().flatten(1) @ (
        value[places].repeat_interleave(kernel).to(weight.device)
    )


def _depthwise(channels: Channels, node: fx.Node, module: Any, weight: Tensor, x: Flow) -> Flow:
    """Follow a convolution of each channel by itself: the channels stay the same."""
    empty, foldable = ~(weight != 0).flatten(1).any(1), _foldable(x, module)
    total = torch.where(foldable, weight.double().flatten(1).sum(1) * x.value, 0.0)
    outputs = Flow(x.axis, x.channels, empty | foldable, _bias(module) + total)
    channels.followers.append((node, outputs))
    return outputs


def _foldable(x: Flow, module: nn.Linear | Convolution) -> Tensor:
    """Return which inputs are constant in such a way that the layer's bias can take them up."""
    return x.fixed & (x.value == 0) if isinstance(module, Convolution) and _pads_zeros(module) else x.fixed


def _pads_zeros(module: Convolution) -> bool:
    if module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _bias(module: nn.Linear | Convolution) -> Tensor:
    bias = module.bias
    return torch.zeros(len(module.weight)).double() if bias is None else bias.detach().double().cpu()


def _batch_norm(channels: Channels, node: fx.Node, module: BatchNorm) -> Flow | None:
    """Follow batch norm in eval mode, which scales and shifts each channel; a scale of 0 makes it constant."""
    x = channels.flows[node.all_input_nodes[0]]
    if x is None:
        return None
    if module.running_mean is None or module.running_var is None:
        return channels.stop(node, "without running statistics its result depends on the batch")
    if x.axis != 1:
        return channels.stop(node, "it normalises another axis than that of the features")
    scale = (module.running_var.double().cpu() + module.eps).rsqrt()
    shift = torch.zeros(len(scale)).double()
    if module.affine:
        scale, shift = scale * module.weight.detach().double().cpu(), module.bias.detach().double().cpu()
    moved = (x.value - module.running_mean.double().cpu()) * scale + shift
    outputs = Flow(1, x.channels, x.fixed | (scale == 0), torch.where(scale == 0, shift, moved))
    channels.followers.append((node, outputs))
    return outputs


# ---------------------------------------------------------------------- element by element


def _same(channels: Channels, node: fx.Node, module: nn.Module | None) -> Flow | None:
    """Follow what hands its input on."""
    return channels.flows[node.all_input_nodes[0]]


def _dropout(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Follow dropout as a function, which may be on in eval mode."""
    if _argument(node, 2, "training", True) is not False:
        return channels.stop(node, "dropout that is on in eval mode is random")
    return _same(channels, node, None)


def _elementwise(channels: Channels, node: fx.Node, module: nn.Module | None) -> Flow | None:
    """Follow a function of one tensor, or of two that have their features along the same axis."""
    flows = {source: channels.flows[source] for source in node.all_input_nodes}
    known = {source: flow for source, flow in flows.items() if flow is not None}
    if not known:
        return None
    if _in_place(node, module) and len(node.all_input_nodes[0].users) > 1:
        return channels.stop(node, "it changes in place what others read")
    if len(known) < len(flows):
        return channels.stop(node, "it also reads something that is not followed")
    if len({(flow.axis, len(flow.channels), len(_shape(source))) for source, flow in known.items()}) > 1:
        return channels.stop(node, "it reads tensors whose features do not match one by one")
    first = next(iter(known.values()))
    for flow in known.values():
        channels.unite(first, flow)
    fixed = torch.stack([flow.fixed for flow in known.values()]).all(0)
    value = _evaluate(node, module, {source: flow.value for source, flow in known.items()})
    if node.target in _PRODUCTS:
        zero = torch.stack([flow.fixed & (flow.value == 0) for flow in known.values()]).any(0)
        fixed, value = fixed | zero, torch.where(zero, 0.0, value)
    return Flow(first.axis, first.channels, fixed, value)


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or name.endswith("_") or bool(node.kwargs.get("inplace", False))


# ---------------------------------------------------------------------- other axes


def _pool(channels: Channels, node: fx.Node, module: nn.Module | None) -> Flow | None:
    """Follow what joins the positions of each feature; asked with ones, it says whether it keeps a constant."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is None:
        return None
    if len(node.all_input_nodes) > 1 or node.meta["shape"] is None:
        return channels.stop(node, "it reads or gives more than one tensor")
    ones = torch.ones([1 if place <= x.axis else size for place, size in enumerate(_shape(source))]).double()
    keeps = bool(((_evaluate(node, module, {source: ones}) - 1).abs() < 1e-12).all())
    return Flow(x.axis, x.channels, x.fixed & ((x.value == 0) | keeps), x.value)


def _mean(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Follow a mean over positions."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is None:
        return None
    dims = _argument(node, 1, "dim", ())
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or any(dim % len(_shape(source)) <= x.axis for dim in dims):
        return channels.stop(node, "it is a mean over features")
    return x


def _flatten(channels: Channels, node: fx.Node, module: nn.Flatten | None) -> Flow | None:
    """Follow flattening: each feature becomes as many as it has positions."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is None:
        return None
    shape = _shape(source)
    start = module.start_dim if module is not None else _argument(node, 1, "start_dim", 0)
    end = module.end_dim if module is not None else _argument(node, 2, "end_dim", -1)
    start, end = start % len(shape), end % len(shape)
    if x.axis < start:
        return x
    if x.axis > end:
        return Flow(x.axis - (end - start), x.channels, x.fixed, x.value)
    if start == 0 and x.axis > 0:
        return channels.stop(node, "it merges the features with the batch")
    return _spread(x, start, prod(shape[start : x.axis]), prod(shape[x.axis + 1 : end + 1]))


def _spread(x: Flow, axis: int, before: int, after: int) -> Flow:
    """Return the features of ``x`` flattened with ``before`` positions before their axis and ``after`` after it."""
    spread = [part.repeat_interleave(after).repeat(before) for part in (x.channels, x.fixed, x.value)]
    return Flow(axis, *spread)


def _reshape(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Follow ``x.view(len(x), -1)`` and ``x.view(-1, features)``: they flatten all but the batch."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is None:
        return None
    shape = _shape(source)
    sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    whole = x.axis > 0 and _shape(node) == (shape[0], prod(shape[1:]))
    batch = sizes[0] == -1 or (isinstance(sizes[0], fx.Node) and _asked(sizes[0], len(shape)) == {0})
    if not (whole and batch):
        return channels.stop(node, "it changes the shape otherwise than by flattening all but the batch")
    channels.flattened.append(node)
    return _spread(x, 1, prod(shape[1 : x.axis]), prod(shape[x.axis + 1 :]))


def _concatenate(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Follow the concatenation of features."""
    parts = node.args[0]
    flows = (
        [channels.flows[part] for part in parts if isinstance(part, fx.Node)]
        if isinstance(parts, (tuple, list))
        else []
    )
    axis = _argument(node, 1, "dim", 0) % len(_shape(node))
    if not flows or any(flow is None or flow.axis != axis for flow in flows):
        return channels.stop(node, "it joins something that is not followed, or along another axis")
    known = [flow for flow in flows if flow is not None]
    joined = [torch.cat([getattr(flow, part) for flow in known]) for part in ("channels", "fixed", "value")]
    return Flow(axis, *joined)


def _permute(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Follow a change of the order of axes."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is None:
        return None
    numbered = _evaluate(node, None, {source: torch.empty([axis + 1 for axis in range(len(_shape(source)))])})
    return Flow(numbered.shape.index(x.axis + 1), x.channels, x.fixed, x.value)


def _size(channels: Channels, node: fx.Node, module: None) -> Flow | None:
    """Let pass a question for another size than the number of features."""
    source = node.all_input_nodes[0]
    x = channels.flows[source]
    if x is not None and x.axis in _asked(node, len(_shape(source))):
        return channels.stop(node, "the module asks for the number of features")
    return None


def _asked(node: fx.Node, ndim: int) -> set[int]:
    """Return which sizes a node asks for, by axis; all of them if that cannot be seen."""
    everything = set(range(ndim))
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _asks(node.args[0]):
        return {node.args[1] % ndim} if isinstance(node.args[1], int) else everything
    if not _asks(node):
        return set() if node.target is getattr and node.args[1] in ("device", "dtype", "ndim") else everything
    dim = _argument(node, 1, "dim", None)
    if isinstance(dim, int):
        return {dim % ndim}
    items = [user.args[1] if user.target is operator.getitem else None for user in node.users]
    numbers = [item % ndim for item in items if isinstance(item, int)]
    return set(numbers) if len(numbers) == len(items) else everything


def _asks(node: fx.Node) -> bool:
    return bool(node.target == "size" or (node.target is getattr and node.args[1] == "shape"))


# ---------------------------------------------------------------------- what rules share


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _evaluate(node: fx.Node, module: nn.Module | None, tensors: Mapping[fx.Node, Tensor]) -> Tensor:
    """Do what the node does, with other tensors."""

    def place(source: fx.Node) -> Any:
        return tensors[source].clone()

    args: Any = fx.node.map_arg(node.args, place)
    kwargs: Any = fx.node.map_arg(node.kwargs, place)
    if module is not None:
        result = module(*args, **kwargs)
    elif isinstance(node.target, str):
        result = getattr(args[0], node.target)(*args[1:], **kwargs)
    else:
        result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


# ---------------------------------------------------------------------- which rule for what


def _named(names: str, *more: Any) -> set[Any]:
    """Return the functions of torch that have these names, with and without _, the names of methods, and ``more``."""
    forms = [form for name in names.split() for form in (name, f"{name}_")]
    return {
        *forms,
        *(getattr(space, form) for space in (torch, functional) for form in forms if hasattr(space, form)),
        *more,
    }


def _rows(rule: Rule, kinds: Iterable[Any]) -> dict[Any, Rule]:
    return dict.fromkeys(kinds, rule)


_PRODUCTS = _named("mul", operator.mul, operator.imul)
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_ARITHMETIC = _named("add sub div neg", operator.add, operator.sub, operator.truediv, operator.neg)
_ACTIVATIONS = _named(
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid softplus softsign "
    "tanhshrink logsigmoid softshrink hardshrink threshold abs square clamp"
)
_ACTIVATION_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid),
    *(nn.Softshrink, nn.Hardshrink, nn.Threshold),
)
_POOLS = _named(
    " ".join(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)),
    *(getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)),
    *(nn.Upsample, functional.interpolate),
)

#: by type of module, function or name of method
RULES: dict[Any, Rule] = {
    **_rows(_mix, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    **_rows(_batch_norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
    **_rows(_same, (nn.Identity, *Dropout.__subclasses__(), "contiguous", "clone", "detach")),
    **_rows(
        _dropout,
        (
            functional.dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.dropout3d,
            functional.alpha_dropout,
            functional.feature_alpha_dropout,
        ),
    ),
    **_rows(_elementwise, (*_ACTIVATION_MODULES, *_ACTIVATIONS, *_ARITHMETIC, *_PRODUCTS, *_IN_PLACE)),
    **_rows(_pool, _POOLS),
    **_rows(_flatten, (nn.Flatten, torch.flatten, "flatten")),
    **_rows(_reshape, ("view", "reshape", torch.reshape)),
    **_rows(_mean, ("mean", torch.mean)),
    **_rows(_concatenate, (torch.cat, torch.concat)),
    **_rows(_permute, ("permute", torch.permute, "transpose", torch.transpose)),
    **_rows(_size, ("size", getattr)),
}
