"""A smaller module that computes the same: neurons and inputs without weights are removed physically."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.compiled import original
from lightning_sparse.export._modules import (
    Example,
    arguments,
    check_dense,
    check_equal,
    check_tolerance,
    evaluating,
    results,
)
from lightning_sparse.export.channels import Channels, Mixer
from lightning_sparse.export.rules import RULES, contribution
from lightning_sparse.layers.sparse import SparseLayer

__all__ = ["CompactReport", "LayerReport", "Select", "compact"]


@dataclass
class LayerReport:
    """What became of one linear layer or convolution.

    Attributes:
        name: of the layer.
        kind: its type.
        before: outputs and inputs (of a convolution: channels) before.
        after: the same after.
        parameters: of weight and bias, before and after.
        kept: why outputs and inputs without weights are still there.
    """

    name: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int]
    parameters: tuple[int, int]
    kept: list[str] = field(default_factory=list)

    @property
    def removed_outputs(self) -> int:
        """How many neurons or filters were removed."""
        return self.before[0] - self.after[0]

    @property
    def removed_inputs(self) -> int:
        """How many inputs the layer no longer reads."""
        return self.before[1] - self.after[1]


@dataclass
class CompactReport:
    """What ``compact`` removed, and what it could not remove and why; ``str`` makes a table of it.

    Attributes:
        layers: linear layers and convolutions, in the order of the data.
        parameters: of the whole module, before and after.
        not_followed: by name of a layer or an operation, why channels were not followed through it.
    """

    layers: list[LayerReport]
    parameters: tuple[int, int]
    not_followed: dict[str, str]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "type", "out x in", "becomes", "parameters", "become")]
        for layer in self.layers:
            sizes = [f"{out} x {inputs}" for out, inputs in (layer.before, layer.after)]
            rows.append((layer.name, layer.kind, *sizes, *(f"{count:,}" for count in layer.parameters)))
        rows.append(("the whole module", "", "", "", *(f"{count:,}" for count in self.parameters)))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        kept = [f"  {layer.name}: {reason}" for layer in self.layers for reason in layer.kept]
        lines += ["Without weights, but kept:", *kept] if kept else []
        stopped = [f"  {name}: {reason}" for name, reason in self.not_followed.items()]
        lines += ["Not followed, so its inputs stay unchanged:", *stopped] if stopped else []
        return "\n".join(lines)


class Select(nn.Module):
    """Hands on some of the features of its input.

    Args:
        dim: the axis of features, counted from the end.
        indices: which features, ``(n,)``.
    """

    indices: Tensor

    def __init__(self, dim: int, indices: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """Return the selected features."""
        return x.index_select(self.dim, self.indices)


def compact(
    module: nn.Module, example_input: Example, *, select: bool = True, tolerance: float | None = None
) -> tuple[fx.GraphModule, CompactReport]:
    """Return a smaller module that computes the same in eval mode, and a report.

    Neurons and channels that have no weights left are removed; what they put out, a constant, goes into the next
    layer's bias. Those that nobody reads are removed with all that is needed for them alone. ``module`` is not changed.

    The data are followed with ``torch.fx`` through ``Linear``, ``Conv1d/2d/3d``, batch norm, activations, pooling,
    flattening, dropout, sums and products, concatenation and permutation. What is not followed stays as it is, and the
    report says so. The result is a ``torch.fx.GraphModule`` for inference with the names of the original's layers; it
    is compared with the original on the example.

    Args:
        module: such as a trained LightningModule; the result does what its ``forward`` does in eval mode.
        example_input: a tensor, or a tuple of positional arguments, on the module's device.
        select: let a layer pick what it reads where its other inputs must stay for others (the data, a residual sum),
            by a ``Select`` before it. Without it the layer keeps inputs that it has no weights for.
        tolerance: the largest difference allowed on the example, relative to the larger of 1 and the largest output;
            None: by dtype of the output, 1e-5 for float32; a GPU computes both without TF32.

    Raises:
        ValueError: torch.fx cannot trace the module, or it has sparse layers.
        RuntimeError: the result differs from the module on the example.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.export import compact
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:4].zero_()  # four neurons without inputs
        ...     _ = net[0].weight[:, 0].zero_()  # an input that nobody reads
        >>> small, report = compact(net, torch.randn(5, 8))
        >>> print(report)
        layer             type    out x in  becomes  parameters  become
        ---------------------------------------------------------------
        0                 Linear     6 x 8    2 x 7          54      16
        2                 Linear     2 x 6    2 x 2          14       6
        the whole module                                     68      22

    Reference:
        GGR counts such neurons and inputs in its Table 4.
    """
    module = original(module)
    check_dense(module, "compact")
    checks.flag(select=select)
    check_tolerance(tolerance)
    expected = results(module, example_input)
    small = trace(module)
    try:
        with torch.no_grad():
            _Shapes(small).run(*arguments(example_input))
    except Exception as error:  # of what stands for *args and **kwargs in the graph
        raise ValueError(_cannot_trace(module, error)) from error
    with torch.no_grad():
        channels = Channels(small, RULES)
        before = _size(small)
        layers = [_shrink(small, channels, mixer, select) for mixer in channels.mixers]
        for node, flow in channels.followers:
            _cut_follower(small.get_submodule(str(node.target)), channels.needed[flow.channels])
    for node in channels.flattened:
        node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}
    small.graph.lint()
    small.recompile()
    check_equal(expected, results(small, example_input), tolerance, "The compacted module")
    return small, CompactReport(layers, (before, _size(small)), channels.stopped)


def trace(module: nn.Module) -> fx.GraphModule:
    """Return the graph of ``module`` in eval mode; it holds copies of the module's layers.

    Raises:
        ValueError: torch.fx cannot trace it.
    """
    try:
        with evaluating(module):
            tracer, graph = _Tracer(), fx.Graph()  # one that knows no tracer: a pickle would need this package for it
            graph.output(graph.graph_copy(tracer.trace(module), {}))
            traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
    except Exception as error:
        raise ValueError(_cannot_trace(module, error)) from error
    return copy.deepcopy(traced).eval()


def _cannot_trace(module: nn.Module, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return (
        f"torch.fx cannot trace {type(module).__name__}: {reason}\n"
        "Its forward may branch on values of tensors, take *args or **kwargs, or call what cannot be followed. Export "
        "a part that can be traced, say module.backbone = compact(module.backbone, example)[0], name the arguments of "
        "forward, or take the branch out of it (torch.fx.wrap keeps a function whole)."
    )


class _Tracer(fx.Tracer):
    """Keeps sparse layers whole, as torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLayer) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor of the graph."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shrink(graph: fx.GraphModule, channels: Channels, mixer: Mixer, select: bool) -> LayerReport:
    """Cut a layer down to the outputs that are needed and the inputs that it reads."""
    layer: Any = graph.get_submodule(mixer.name)
    size, parameters = (len(layer.weight), layer.weight.shape[1]), _size(layer)
    rows, present = channels.needed[mixer.outputs.channels], channels.needed[mixer.inputs.channels]
    columns = present & mixer.reads(channels.needed) if select else present
    if not columns.any():
        columns = torch.arange(len(columns)) == present.nonzero()[0]  # a layer keeps one input at least
    _carry(layer, mixer)
    _fold(layer, mixer.foldable & ~columns, mixer.inputs.value)
    if not torch.equal(columns, present):
        _select(graph, mixer, columns[present])
    layer.weight = _cut(_cut(layer.weight, rows, 0), columns, 1)
    layer.bias = _cut(layer.bias, rows, 0)
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    for name, count in zip(names, layer.weight.shape, strict=False):
        setattr(layer, name, count)
    return LayerReport(
        mixer.name,
        type(layer).__name__,
        before=size,
        after=(len(layer.weight), layer.weight.shape[1]),
        parameters=(parameters, _size(layer)),
        kept=_kept(channels, mixer, rows, columns),
    )


def _carry(layer: Any, mixer: Mixer) -> None:
    """Let one constant input stand for all those that the bias cannot take up."""
    places = (mixer.share != 0).to(layer.weight.device)
    if places.sum() < 2:
        return
    share = mixer.share.to(layer.weight.device)[places]
    carried = torch.einsum("oi...,i->o...", layer.weight[:, places].double(), share)
    layer.weight[:, places] = 0
    layer.weight[:, mixer.carrier] = carried.to(layer.weight.dtype)


def _fold(layer: Any, places: Tensor, value: Tensor) -> None:
    """Add what constant inputs contribute to the bias."""
    share = contribution(layer.weight, places, value)
    if share.any():
        bias = share if layer.bias is None else layer.bias.double() + share
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)


def _select(graph: fx.GraphModule, mixer: Mixer, places: Tensor) -> None:
    """Put before a layer what picks the features that it reads."""
    indices = places.nonzero().flatten().to(graph.get_parameter(f"{mixer.name}.weight").device)
    name = f"select_{mixer.name.replace('.', '_')}"
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, Select(mixer.inputs.axis - len(mixer.node.meta["shape"]), indices))
    with graph.graph.inserting_before(mixer.node):
        picked = graph.graph.call_module(name, mixer.node.args or tuple(mixer.node.kwargs.values()))
    mixer.node.args, mixer.node.kwargs = (picked,), {}


def _cut_follower(layer: Any, keep: Tensor) -> None:
    """Cut a batch norm or a depthwise convolution down to the channels that are needed."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if hasattr(layer, name):
            setattr(layer, name, _cut(getattr(layer, name), keep, 0))
    count = int(keep.sum())
    for name in ("num_features", "in_channels", "out_channels", "groups"):
        if hasattr(layer, name):
            setattr(layer, name, count)


def _cut(x: Any, keep: Tensor, dim: int) -> Any:
    """Return the part of a parameter, a buffer or None that is kept."""
    if x is None or keep.all():
        return x
    part = x.detach().index_select(dim, keep.nonzero().flatten().to(x.device))
    return nn.Parameter(part, x.requires_grad) if isinstance(x, nn.Parameter) else part


def _kept(channels: Channels, mixer: Mixer, rows: Tensor, columns: Tensor) -> list[str]:
    """Say why outputs and inputs without weights stay."""
    empty = {
        "output": mixer.outputs.channels[rows & ~mixer.connected.any(1)],
        "input": mixer.inputs.channels[columns & ~mixer.connected[rows].any(0)],
    }
    reasons = Counter((side, channels.why(int(channel))) for side, found in empty.items() for channel in found)
    return [f"{count} {side}{'s' * (count > 1)}: {why}" for (side, why), count in reasons.items()]
