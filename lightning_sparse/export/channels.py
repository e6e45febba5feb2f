"""Which channels of a traced module can go: those that are constant, and those that nobody reads.

Every tensor that flows through the module has one axis of features. Each feature belongs to a *channel*, a number.
What works feature by feature (activations, batch norm, pooling, depthwise convolutions) hands channels on, flattening
repeats them, a sum makes two channels one; only linear layers and convolutions, which mix, make new ones. So a channel
is all that must leave together.

Two passes find what can leave. Forwards (``rules.py``): which features are constant, and their value. Backwards, from
the module's output: which channels are needed. A layer that mixes needs a feature if an output of it that is needed
itself has a weight for it, unless the feature is constant: then the bias can take it up. A convolution that pads with
zeros cannot take up a constant other than zero, since at the border it would have met the zero; but one constant can
stand for all the others that it reads.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_sparse.compat.torch_private import has_forward_hooks

__all__ = ["Channels", "Flow", "Mixer", "Rule"]

#: follows one node: called with the channels, the node and the module that it calls, if any
Rule = Callable[["Channels", fx.Node, Any], "Flow | None"]


@dataclass
class Flow:
    """What is known of a tensor that flows through the module.

    Attributes:
        axis: the axis of features.
        channels: the channel that each feature belongs to, ``(features,)``.
        fixed: whether the feature is the same number at all positions and for every input, ``(features,)``.
        value: that number, in float64, ``(features,)``; without meaning where the feature is not fixed.
    """

    axis: int
    channels: Tensor
    fixed: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        self.fixed = self.fixed & self.value.isfinite()


@dataclass
class Mixer:
    """A linear layer or convolution whose size can change.

    Attributes:
        name: of the module.
        node: where it is called.
        inputs: what it reads.
        outputs: what it writes.
        connected: which output has a weight for which input, ``(out, in)``.
        foldable: inputs that are constant in such a way that the bias can take them up, ``(in,)``.
        carrier: the input that stands for the constant inputs that the bias cannot take up, if there are any.
        share: these inputs relative to the carrier, ``(in,)``; 0 elsewhere.
    """

    name: str
    node: fx.Node
    inputs: Flow
    outputs: Flow
    connected: Tensor
    foldable: Tensor
    carrier: int
    share: Tensor

    def reads(self, needed: Tensor) -> Tensor:
        """Return which inputs the needed outputs read, ``(in,)``."""
        return self.connected[needed[self.outputs.channels]].any(0) & ~self.foldable


class Channels:
    """The channels of a module.

    Args:
        module: traced, in eval mode; each node's ``meta["shape"]`` is that of its tensor, None if it gives none.
        rules: how to follow a node, by the type of the module it calls, by function or by name of method.

    Attributes:
        flows: what is known of each node's tensor; None: nothing.
        mixers: the layers that can change their inputs and outputs, in the order of the data.
        followers: calls of layers with parameters by channel (batch norm, depthwise convolution), with what they write.
        flattened: calls of ``reshape`` and ``view`` that do what ``flatten(1)`` does.
        stopped: by name of a layer or an operation that is not followed, why.
        needed: by channel, whether it must stay.
    """

    def __init__(self, module: fx.GraphModule, rules: Mapping[Any, Rule]) -> None:
        self.module = module
        self.rules = rules
        self.flows: dict[fx.Node, Flow | None] = {}
        self.mixers: list[Mixer] = []
        self.followers: list[tuple[fx.Node, Flow]] = []
        self.flattened: list[fx.Node] = []
        self.stopped: dict[str, str] = {}
        self._same: list[int] = []  # by channel, one that it is the same as: a forest
        self._pinned: dict[int, str] = {}
        self._fragile = _fragile(module)
        for node in module.graph.nodes:
            self.flows[node] = self._follow(node)
        self._merge()
        self.needed = self._find_needed()

    def why(self, channel: int) -> str:
        """Say why a channel stays that a layer has no weights for."""
        if channel in self._pinned:
            return self._pinned[channel]
        for mixer in self.mixers:
            constant = mixer.inputs.fixed & ~mixer.foldable & (mixer.inputs.channels == channel)
            if constant.any() and (constant & mixer.reads(self.needed)).any():  # the latter takes long
                return f"a constant that cannot go into the bias of {mixer.name}, which pads with zeros"
        return "in use elsewhere: a sum with other layers, or inputs that others read"

    # ------------------------------------------------------------------ what rules call

    def new(self, count: int) -> Tensor:
        """Return new channels."""
        start = len(self._same)
        self._same.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def unknown(self, axis: int, features: int, reason: str) -> Flow:
        """Return features of which nothing is known, and which must stay."""
        flow = Flow(axis, self.new(features), torch.zeros(features, dtype=torch.bool), torch.zeros(features).double())
        self.pin(flow, reason)
        return flow

    def pin(self, flow: Flow, reason: str) -> None:
        """Make all channels of ``flow`` stay."""
        for channel in flow.channels.tolist():
            self._pinned.setdefault(channel, reason)

    def unite(self, a: Flow, b: Flow) -> None:
        """Make the channels of ``a`` and ``b`` leave together or not at all."""
        for one, other in zip(a.channels.tolist(), b.channels.tolist(), strict=True):
            self._same[self._find(other)] = self._find(one)

    def stop(self, node: fx.Node, reason: str) -> Flow | None:
        """Leave a node as it is: whatever is known to flow into it must stay, and nothing is known of its result."""
        known = [flow for source in node.all_input_nodes if (flow := self.flows[source]) is not None]
        name = str(node.target) if node.op == "call_module" else node.name
        layer = node.op == "call_module" and any(True for _ in self.module.get_submodule(name).parameters())
        if known or layer:
            self.stopped[name] = reason
        for flow in known:
            self.pin(flow, f"read by {name}, which is not followed")
            flow.fixed = torch.zeros_like(flow.fixed)  # it may be changed in place
        return None

    def read(self, node: fx.Node, axis: int, features: int) -> Flow:
        """Return what a layer reads along ``axis``; features of which nothing is known must stay as they are."""
        flow = self.flows[node]
        if flow is not None and flow.axis == axis:
            return flow
        if flow is not None:
            self.pin(flow, f"read along another axis than that of the features of {node.name}")
        return self.unknown(axis, features, f"given by {node.name}")

    # ------------------------------------------------------------------ the passes

    def _follow(self, node: fx.Node) -> Flow | None:
        """Return what is known of the node's tensor, from what is known of its inputs."""
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            for source in node.all_input_nodes:
                flow = self.flows[source]
                if flow is not None:
                    self.pin(flow, "the module's output")
            return None
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module in self._fragile:
            return self.stop(node, self._fragile[module])
        rule = self.rules.get(node.target if module is None else type(module))
        if rule is None:
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
            return self.stop(node, f"{what} is not followed")
        return rule(self, node, module)

    def _find(self, channel: int) -> int:
        while self._same[channel] != channel:
            self._same[channel] = self._same[self._same[channel]]
            channel = self._same[channel]
        return channel

    def _merge(self) -> None:
        """Give united channels one number."""
        root = torch.tensor([self._find(channel) for channel in range(len(self._same))], dtype=torch.long)
        layers = [flow for mixer in self.mixers for flow in (mixer.inputs, mixer.outputs)]
        for flow in [*self.flows.values(), *layers, *(flow for _, flow in self.followers)]:
            if flow is not None:
                flow.channels = root[flow.channels]  # a root is its own root: more than once does no harm
        self._pinned = {int(root[channel]): reason for channel, reason in self._pinned.items()}

    def _find_needed(self) -> Tensor:
        """Return the needed channels: from those that are pinned back through the layers, until none is added."""
        needed = torch.zeros(len(self._same), dtype=torch.bool)
        needed[list(self._pinned)] = True
        while True:
            before = int(needed.sum())
            for mixer in reversed(self.mixers):
                needed[mixer.inputs.channels[mixer.reads(needed)]] = True
            if int(needed.sum()) > before:
                continue
            empty = [mixer for mixer in self.mixers if not needed[mixer.outputs.channels].any()]
            if not empty:
                return needed
            last = int(empty[-1].outputs.channels[0])
            self._pinned[last] = "a layer keeps one output at least"
            needed[last] = True


def _fragile(module: fx.GraphModule) -> dict[nn.Module | None, str]:
    """Return the modules that others depend on in ways the graph does not show, and how."""
    calls = Counter(module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module")
    owners = Counter(parameter for part in module.modules() for parameter in part.parameters(recurse=False))
    direct = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    used = {tensor for name, tensor in chain(module.named_parameters(), module.named_buffers()) if name in direct}
    result: dict[nn.Module | None, str] = {}
    for part, count in calls.items():
        held = [*part.parameters(), *part.buffers()]
        if has_forward_hooks(part):
            result[part] = "it has forward hooks"
        elif held and count > 1:
            result[part] = "it is called several times"
        elif any(owners[tensor] > 1 for tensor in part.parameters()) or used.intersection(held):
            result[part] = "its parameters are in use elsewhere"
    return result
