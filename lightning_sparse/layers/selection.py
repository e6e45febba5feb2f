"""Which parameters of a module are weights to make sparse, and why the others are not."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sparse.compat import checks
from lightning_sparse.compat.compiled import plain_name
from lightning_sparse.compat.torch_private import RunningNorm
from lightning_sparse.layers import transforms
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.layers.transforms import Transform
from lightning_sparse.rules.matrices import FIRST, Outputs

__all__ = [
    "FROZEN",
    "LAYERS",
    "NORMS",
    "RULES",
    "LayerKind",
    "ParameterChoice",
    "patterns",
    "register_layer",
    "select_parameters",
    "table",
]


class LayerKind(NamedTuple):
    """What is to know of the layers of one type.

    Attributes:
        weights: what the names of their weights begin with.
        by_default: they are made sparse without ``include``.
        out_axis: the dimension of the weight along which the outputs lie; a negative one counts from the last.
        grouped: the layer's ``groups`` divide the first dimension, and each has outputs of its own.
        stacked: of a weight with more than two dimensions, the first counts matrices, such as experts.
        unless: attributes of a layer that, if there are any, say that it makes its weight of several parameters first;
            then it is made sparse only on request.
    """

    weights: tuple[str, ...] = ("weight",)
    by_default: bool = True
    out_axis: int = 0
    grouped: bool = False
    stacked: bool = False
    unless: tuple[str, ...] = ()


_ON_REQUEST = LayerKind(by_default=False)
_TRANSPOSED = LayerKind(by_default=False, out_axis=1, grouped=True)

#: layers with weights, by type, or by its full name where the package is not imported; those of other types are made
#: sparse only on request. A subclass is as its nearest base. MultiheadAttention's out_proj and
#: sparse linear layers are Linear
LAYERS: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LayerKind(),
    nn.Bilinear: LayerKind(),
    nn.Conv1d: LayerKind(),
    nn.Conv2d: LayerKind(),
    nn.Conv3d: LayerKind(),
    nn.RNNBase: LayerKind(("weight_",)),
    nn.RNNCellBase: LayerKind(("weight_",)),
    nn.MultiheadAttention: LayerKind(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    nn.Embedding: _ON_REQUEST,
    nn.EmbeddingBag: _ON_REQUEST,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    "transformers.pytorch_utils.Conv1D": LayerKind(out_axis=1),
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": LayerKind(
        ("gate_up_proj", "down_proj"), out_axis=-1, stacked=True
    ),
    "torch_geometric.nn.dense.linear.Linear": LayerKind(),
    "torch_geometric.nn.dense.linear.HeteroLinear": LayerKind(out_axis=-1, stacked=True),
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": LayerKind(
        ("weight", "root"), out_axis=-1, stacked=True, unless=("num_bases", "num_blocks")
    ),
}
NORMS = (RunningNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

#: packages whose classes are named without them
_OWN = ("torch", "lightning_sparse")

#: reason of a parameter that does not train
FROZEN = "frozen"
_NO_WEIGHT = "bias, norm or scalar"


def register_layer(
    layer: type[nn.Module], *, weights: Sequence[str] = ("weight",), out_axis: int = 0, stacked: bool = False
) -> None:
    """Make the weights of a layer type known: they are made sparse by default, and their outputs lie where you say.

    Thresholds, fan-in and empty neurons go by the outputs: a neuron is all that one output reads. Subclasses are as
    their nearest base that is known. Call it where the class is defined, so that every process does.

    Args:
        layer: the type of the module that holds the parameters, a linear map or convolution of what it reads.
        weights: what the names of its weights begin with; biases never count.
        out_axis: the dimension along which the outputs lie, such as 1 for a weight ``(in, out)``; a negative one
            counts from the last.
        stacked: the first dimension of a weight with more than two counts matrices, such as experts
            ``(experts, out, in)``, whose ``out_axis`` is 1. Each has neurons of its own; together they are one weight.

    Raises:
        ValueError: an argument is not as it should be.

    Example:
        >>> import torch
        >>> from lightning_sparse import register_layer
        >>> class InOut(torch.nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> register_layer(InOut, out_axis=1)
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"layer must be a subclass of torch.nn.Module, got {layer!r}. Give the class, not a layer.")
    if isinstance(weights, str) or not weights or not all(isinstance(name, str) and name for name in weights):
        raise ValueError(f'weights must be a list of names such as ["weight"], got {weights!r}.')
    if not isinstance(out_axis, int) or isinstance(out_axis, bool):
        raise ValueError(f"out_axis must be an integer, got {out_axis!r}. Give 1 for a weight (in, out).")
    if not isinstance(stacked, bool):
        raise ValueError(f"stacked must be True or False, got {stacked!r}. True is for weights (experts, out, in).")
    if stacked and out_axis == 0:
        raise ValueError(
            "out_axis must not be 0 with stacked=True, got 0: the first dimension counts the matrices. Give 1 for a "
            "weight (experts, out, in), or 2 for (experts, in, out)."
        )
    LAYERS[layer] = LayerKind(tuple(weights), out_axis=out_axis, stacked=stacked)


@dataclass
class ParameterChoice:
    """One parameter of the module, and what is done with it.

    Attributes:
        name: the parameter's name in the LightningModule.
        kind: the type of the module that holds it, with its package if that is not torch.
        parameter: the parameter itself.
        reason: why it is left dense; None if it is made sparse.
        tied: its other names, if it stands in several places.
        outputs: where the layer's outputs lie.
        nonempty: where rows lie of which each must keep a connection, since it is divided by its norm; None: any may
            be empty.
        sparse: the layer, if it holds only the nonzeros of the weight: ``parameter`` is the vector of their values.
        is_weight: it is neither bias, norm, gain nor scalar.
        on_request: it is left dense, but ``include`` may name it.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    reason: str | None
    tied: tuple[str, ...] = ()
    outputs: Outputs = FIRST
    nonempty: Outputs | None = None
    sparse: SparseLayer | None = None
    is_weight: bool = True
    on_request: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape) if self.sparse is None else self.sparse.shape

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def can_be_added(self) -> bool:
        """It is left dense, but ``include`` may name it, and more than a vector."""
        return self.on_request and sum(size > 1 for size in self.shape) > 1

    @property
    def layer(self) -> str:
        """The layer in words."""
        return f"{self.kind}, tied to {', '.join(self.tied)}" if self.tied else self.kind


def select_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[ParameterChoice]:
    """Say of every parameter of ``module`` whether it is made sparse.

    By default these are the weights of linear, convolution, recurrent and attention layers, and of the layers that
    ``register_layer`` has made known. With ``include`` they are the weights whose name matches one of its glob
    patterns, whatever the layer (so also those of embeddings and transposed convolutions); ``exclude`` takes names away
    from either. Biases, norms, gains, frozen parameters, and weights whose zeros are changed before use never count. A
    weight that stands in several places (tied) appears once, under its first name.

    Raises:
        ValueError: a pattern matches no weight, a lazy layer has no shape yet, an embedding has sparse gradients, a
            layer was registered with an axis that its weight does not have, or an argument is of another type.
    """
    checks.module(module=module)
    include, exclude = checks.patterns(include=include), checks.patterns(exclude=exclude) or []
    choices = []
    unused = {*(include or ()), *exclude}
    for parameter, places in _places(module):
        candidate = Candidate(parameter, places, include, exclude)
        _refuse_lazy(candidate)
        choice = candidate.choice()
        choices.append(choice)
        if choice.reason is None:
            _refuse_sparse_gradients(candidate)
            _refuse_other_dimensions(candidate)
        if candidate.verdict[0] not in _NEVER:
            unused -= candidate.matched
    _refuse_unused(unused, choices)
    return choices


# ---------------------------------------------------------------------- candidates


class Place(NamedTuple):
    """Where a parameter stands.

    Attributes:
        name: in the module.
        local: its name in the layer, without that of a parametrization.
        layer: that it belongs to.
        parametrized: the parametrization that holds it, and its name there.
    """

    name: str
    local: str
    layer: nn.Module
    parametrized: tuple[ParametrizationList, str] | None = None

    @property
    def kind(self) -> LayerKind | None:
        """What is known of the layer."""
        found = (LAYERS.get(type_) or LAYERS.get(_full_name(type_)) for type_ in type(self.layer).__mro__)
        return next((kind for kind in found if kind), None) or _of_experts(self.layer)

    @property
    def weight_of(self) -> LayerKind | None:
        """What is known of the layer, if this is one of its weights."""
        gain = self.local.endswith("_g")  # of weight_norm
        return self.kind if self.kind and not gain and self.local.startswith(self.kind.weights) else None

    @property
    def by_default(self) -> bool:
        """Whether the parameter is made sparse there without ``include``."""
        kind = self.weight_of
        return kind is not None and kind.by_default and not any(getattr(self.layer, name, None) for name in kind.unless)

    @property
    def transform(self) -> Transform | None:
        """What is done to the parameter before the layer computes with it."""
        if self.parametrized:
            return transforms.of_parametrization(*self.parametrized)
        return transforms.of_layer(self.layer, self.local)

    def outputs(self, shape: Sequence[int]) -> Outputs:
        """Return where the outputs lie in a weight of this ``shape``."""
        kind = self.weight_of
        if kind is None or not -len(shape) <= kind.out_axis < len(shape):
            return FIRST
        axis, stacked = kind.out_axis % len(shape), kind.stacked and len(shape) > 2
        groups: Any = shape[0] if stacked else getattr(self.layer, "groups", 1) if kind.grouped else 1
        return Outputs(axis, int(groups), stacked)


def _of_experts(layer: nn.Module) -> LayerKind | None:
    """Return what is known of the experts of transformers 5, which say how their weights lie; of others None."""
    marks = vars(layer)
    transposed = marks.get("is_transposed")
    if not (isinstance(transposed, bool) and isinstance(marks.get("has_bias"), bool)):
        return None
    return LayerKind(("gate_up_proj", "up_proj", "down_proj"), out_axis=-1 if transposed else -2, stacked=True)


def _full_name(type_: type) -> str:
    return f"{type_.__module__}.{type_.__qualname__}"


def _kind(layer: nn.Module) -> str:
    """Return the name of a layer's type, with its package if that is neither torch nor this one."""
    kind = type(layer)
    return kind.__name__ if kind.__module__.partition(".")[0] in _OWN else _full_name(kind)


@dataclass(frozen=True)
class Candidate:
    """One parameter with all its places, and the patterns that were given."""

    parameter: nn.Parameter
    places: Sequence[Place]
    include: Sequence[str] | None
    exclude: Sequence[str]

    @property
    def sparse(self) -> SparseLayer | None:
        """The layer, if it holds only the nonzeros."""
        layer = self.places[0].layer
        return layer if isinstance(layer, SparseLayer) and self.places[0].local == "weight" else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape) if self.sparse is None else self.sparse.shape

    @cached_property
    def matched(self) -> set[str]:
        """The patterns that match one of its names."""
        names = [place.name for place in self.places]
        return {pattern for pattern in (*(self.include or ()), *self.exclude) if _matches(pattern, names)}

    @property
    def outputs(self) -> Outputs:
        """See ``ParameterChoice``."""
        return next((found for place in self.places if (found := place.outputs(self.shape)) != FIRST), FIRST)

    @cached_property
    def transform(self) -> Transform:
        """What is done to it before it is used, in the first place that does anything."""
        return next((found for place in self.places if (found := place.transform) is not None), Transform())

    @cached_property
    def verdict(self) -> tuple["Rule | None", str | None]:
        """The rule by which it is left dense, and why; None if it is made sparse."""
        found = ((rule, reason) for rule in RULES if (reason := rule(self)) is not None)
        return next(found, (None, None))

    def choice(self) -> ParameterChoice:
        """Return what is done with it."""
        first, *others = self.places
        rule, reason = self.verdict
        return ParameterChoice(
            name=first.name,
            kind=_kind(first.layer),
            parameter=self.parameter,
            reason=reason,
            tied=tuple(place.name for place in others),
            outputs=self.outputs,
            nonempty=self.transform.nonempty if reason is None else None,
            sparse=self.sparse,
            is_weight=rule not in (_no_weight, _gain),
            on_request=rule in (_only_on_request, _not_included),
        )


def _places(module: nn.Module) -> Iterator[tuple[nn.Parameter, list[Place]]]:
    """Yield each parameter once, with all its places."""
    found: dict[nn.Parameter, list[Place]] = {}
    for prefix, holder in module.named_modules():
        for local, parameter in holder.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if isinstance(holder, ParametrizationList):  # LAYER.parametrizations.WEIGHT
                owner, _, weight = prefix.rpartition(".")
                layer = module.get_submodule(owner.rpartition(".")[0])
                place = Place(name, weight, layer, (holder, local))
            else:
                place = Place(name, local, holder)
            found.setdefault(parameter, []).append(place)
    yield from found.items()


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Match a glob on any of the names; ``*.head.weight`` also finds a ``head.weight`` at the top."""
    plain = [plain_name(name) for name in names]
    return any(fnmatchcase(form, pattern) for name in (*names, *plain) for form in (name, f".{name}"))


# ---------------------------------------------------------------------- rules: why a parameter is left dense


def _no_weight(candidate: Candidate) -> str | None:
    """Biases, norms and scalars are never made sparse."""
    never = any(
        place.local.startswith("bias") or place.local.endswith("bias") or isinstance(place.layer, NORMS)
        for place in candidate.places
    )
    return _NO_WEIGHT if never or len(candidate.shape) < 2 else None


def _gain(candidate: Candidate) -> str | None:
    """What multiplies whole rows of a weight is never made sparse."""
    for place in candidate.places:
        one_a_row = sum(size > 1 for size in candidate.shape) <= 1
        if place.kind and not place.local.startswith(place.kind.weights) and one_a_row:
            return "gain"
        within = place.parametrized
        held = within and transforms.is_factor(*within)
        if held or transforms.is_gain(place.layer, place.local):
            return "gain or factor of a weight"
    return None


def _excluded(candidate: Candidate) -> str | None:
    """``exclude`` takes weights away."""
    return "excluded" if candidate.matched & set(candidate.exclude) else None


def _not_included(candidate: Candidate) -> str | None:
    """With ``include``, only the weights that it names are made sparse."""
    missed = candidate.include is not None and not candidate.matched & set(candidate.include)
    return "not included" if missed else None


def _only_on_request(candidate: Candidate) -> str | None:
    """Without ``include``, only weights of the layers in the table are, a tied one if it is in all its places."""
    if candidate.include is not None:
        return None
    others = [_kind(place.layer) for place in candidate.places if not place.by_default]
    return f"{others[0]}: only on request (include)" if others else None


def _frozen(candidate: Candidate) -> str | None:
    """What does not train stays as it is."""
    return None if candidate.parameter.requires_grad else FROZEN


def _not_real(candidate: Candidate) -> str | None:
    """There must be real numbers to set to 0."""
    real = candidate.parameter.is_floating_point() and math.prod(candidate.shape) > 0
    return None if real else "not a real-valued tensor with elements"


def _transformed(candidate: Candidate) -> str | None:
    """Zeros must still be zeros when the layer computes."""
    return candidate.transform.reason


Rule = Callable[[Candidate], str | None]

#: the first one that gives a reason counts
RULES: tuple[Rule, ...] = (
    _no_weight,
    _gain,
    _excluded,
    _not_included,
    _only_on_request,
    _frozen,
    _not_real,
    _transformed,
)

#: what no pattern can make sparse
_NEVER: tuple[Rule | None, ...] = (_no_weight, _gain, _transformed)


# ---------------------------------------------------------------------- errors


def _refuse_lazy(candidate: Candidate) -> None:
    if isinstance(candidate.parameter, UninitializedParameter):
        first = candidate.places[0]
        raise ValueError(
            f"{first.name} ({_kind(first.layer)}) must have a shape when the fit starts, but is not initialized. Run "
            "an example through the module before, e.g. in __init__ or configure_model."
        )


def _refuse_sparse_gradients(candidate: Candidate) -> None:
    if any(isinstance(place.layer, _EMBEDDINGS) and place.layer.sparse for place in candidate.places):
        first = candidate.places[0]
        raise ValueError(
            f"{first.name} ({_kind(first.layer)}) must have dense gradients to be made sparse, but its layer has "
            f"sparse=True. Make the layer with sparse=False, or leave it out with exclude=[{first.name!r}]."
        )


def _refuse_other_dimensions(candidate: Candidate) -> None:
    for place in candidate.places:
        axis, dimensions = place.weight_of.out_axis if place.weight_of else 0, len(candidate.shape)
        if not -dimensions <= axis < dimensions:
            raise ValueError(
                f"{place.name} ({_kind(place.layer)}) must have the dimension out_axis={axis} that register_layer was "
                f"given, but its shape is {candidate.shape}. Name other weights, or another out_axis."
            )


def _refuse_unused(patterns: set[str], choices: Sequence[ParameterChoice]) -> None:
    if patterns:
        weights = [choice.name for choice in choices if choice.is_weight]
        near = "".join(checks.did_you_mean(pattern, weights) for pattern in sorted(patterns))
        matched = [choice for choice in choices if any(_matches(pattern, [choice.name]) for pattern in patterns)]
        others = "".join(f"{c.name} cannot be: {c.reason}. " for c in matched if c.is_weight and c.reason is not None)
        raise ValueError(
            f"include and exclude must match the names of weights, but {sorted(patterns)} match none. {near}"
            f"Biases, norms and gains are never made sparse. {others}The weights are: {weights}."
        )


# ---------------------------------------------------------------------- in words


def patterns(choices: Sequence[ParameterChoice]) -> list[str]:
    """Return glob patterns for ``include`` that choose the weights that are sparse, and all that it may add.

    Numbers of layers become ``*`` wherever that matches nothing else.
    """
    wanted = [plain_name(choice.name) for choice in choices if choice.reason is None or choice.can_be_added]
    others = {plain_name(choice.name) for choice in choices if choice.is_weight} - {*wanted}
    found: dict[str, None] = {}
    for name in wanted:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        found[name if any(_matches(pattern, [other]) for other in others) else pattern] = None
    return list(found)


def table(
    title: str,
    choices: Sequence[ParameterChoice],
    densities: Mapping[str, float] | None = None,
    whole: bool = True,
) -> str:
    """Return a readable table of what is sparse, what is not and why.

    Args:
        title: its first line.
        choices: all parameters.
        densities: those that are planned, by parameter name; None or empty: they are found in training.
        whole: the parameters are all that the module has: say how sparse it is as a whole.
    """
    rows = [("weight", "layer", "shape", "density", "training"), *_rows(choices, densities or {})]
    if not densities:
        rows = [row[:3] + row[4:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    planned = [_planned(choices, densities)] if densities and whole else []
    return "\n".join([title, *lines, _summary(choices), *planned])


def _rows(choices: Sequence[ParameterChoice], densities: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each parameter; those of one dimension stand together, by the reason why they are dense."""
    small: Counter[str] = Counter()
    for choice in choices:
        if choice.reason is not None and len(choice.shape) < 2:
            small[choice.reason] += 1
            continue
        state = "sparse" if choice.reason is None else f"dense ({choice.reason})"
        density = f"{densities[choice.name]:.4g}" if choice.name in densities else ""
        yield choice.name, choice.layer, " x ".join(map(str, choice.shape)), density, state
    for reason, count in small.items():
        yield f"{count} small ones", "", "", "", f"dense ({reason})"


def _summary(choices: Sequence[ParameterChoice]) -> str:
    """Return in words how many parameters train sparse."""
    sizes = [choice.size for choice in choices if choice.reason is None]
    sparse, total = sum(sizes), sum(choice.size for choice in choices)
    return f"{len(sizes)} weights, {sparse:,} of {total:,} parameters ({sparse / max(total, 1):.1%}) train sparse"


def _planned(choices: Sequence[ParameterChoice], densities: Mapping[str, float]) -> str:
    """Return in words how sparse the weights are to be, and the module with them."""
    planned = [choice for choice in choices if choice.name in densities]
    zeros = sum(choice.size * (1 - densities[choice.name]) for choice in planned)
    sizes = sum(choice.size for choice in planned), sum(choice.size for choice in choices)
    of_weights, of_module = (zeros / max(size, 1) for size in sizes)
    return f"sparsity {of_weights:.4g} of these weights, {of_module:.4g} of the whole module"
