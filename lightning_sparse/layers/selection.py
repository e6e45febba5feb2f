"""Which parameters of a module are weights to make sparse, and why the others are not."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.compat import checks
from lightning_sparse.compat.compiled import plain_name
from lightning_sparse.compat.torch_private import RunningNorm
from lightning_sparse.layers.sparse import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["FROZEN", "LAYERS", "NORMS", "RULES", "ParameterChoice", "select_parameters", "table"]


class LayerKind(NamedTuple):
    """What is to know of the layers of one type.

    Attributes:
        weights: what the names of their weights begin with.
        by_default: they are made sparse without ``include``.
        output_axis: the dimension of the weight along which the outputs lie, 0 or 1.
    """

    weights: tuple[str, ...] = ("weight",)
    by_default: bool = True
    output_axis: int = 0


_ON_REQUEST = LayerKind(by_default=False)
_TRANSPOSED = LayerKind(by_default=False, output_axis=1)

#: layers with weights; those of other types are made sparse only on request. MultiheadAttention's out_proj is a Linear
LAYERS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(),
    nn.Bilinear: LayerKind(),
    nn.Conv1d: LayerKind(),
    nn.Conv2d: LayerKind(),
    nn.Conv3d: LayerKind(),
    nn.RNNBase: LayerKind(("weight_",)),
    SparseLinear: LayerKind(),
    SparseConv2d: LayerKind(),
    nn.RNNCellBase: LayerKind(("weight_",)),
    nn.MultiheadAttention: LayerKind(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    nn.Embedding: _ON_REQUEST,
    nn.EmbeddingBag: _ON_REQUEST,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
}
NORMS = (RunningNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

#: reason of a parameter that does not train
FROZEN = "frozen"
_NO_WEIGHT = "bias, norm or scalar"


@dataclass
class ParameterChoice:
    """One parameter of the module, and what is done with it.

    Attributes:
        name: the parameter's name in the LightningModule.
        kind: the type of the module that holds it.
        parameter: the parameter itself.
        reason: why it is left dense; None if it is made sparse.
        tied: its other names, if it stands in several places.
        transposed_groups: the number of groups of a transposed convolution, whose outputs lie along the second
            dimension; 0 for every other layer.
        sparse: the layer, if it holds only the nonzeros of the weight: ``parameter`` is the vector of their values.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    reason: str | None
    tied: tuple[str, ...] = ()
    transposed_groups: int = 0
    sparse: SparseLayer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape) if self.sparse is None else self.sparse.shape

    @property
    def layer(self) -> str:
        """The layer in words."""
        return f"{self.kind}, tied to {', '.join(self.tied)}" if self.tied else self.kind


def select_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[ParameterChoice]:
    """Say of every parameter of ``module`` whether it is made sparse.

    By default these are the weights of linear, convolution, recurrent and attention layers. With ``include`` they are
    the weights whose name matches one of its glob patterns, whatever the layer (so also those of embeddings and
    transposed convolutions); ``exclude`` takes names away from either. Biases, norms and frozen parameters never count.
    A weight that stands in several places (tied) appears once, under its first name.

    Raises:
        ValueError: a pattern matches no weight, a lazy layer has no shape yet, or an embedding has sparse gradients;
            an argument is of another type.
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
        if choice.reason != _NO_WEIGHT:
            unused -= candidate.matched
    _refuse_unused(unused, choices)
    return choices


# ---------------------------------------------------------------------- candidates


class Place(NamedTuple):
    """Where a parameter stands: its name in the module, its name in the layer that holds it, and that layer."""

    name: str
    local: str
    holder: nn.Module

    @property
    def kinds(self) -> list[LayerKind]:
        """What ``LAYERS`` says of the layer."""
        return [kind for type_, kind in LAYERS.items() if isinstance(self.holder, type_)]

    @property
    def by_default(self) -> bool:
        """Whether the parameter is made sparse there without ``include``."""
        gain = self.local.endswith("_g")  # of weight_norm
        return not gain and any(kind.by_default and self.local.startswith(kind.weights) for kind in self.kinds)


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
        holder = self.places[0].holder
        return holder if isinstance(holder, SparseLayer) and self.places[0].local == "weight" else None

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
    def transposed_groups(self) -> int:
        """See ``ParameterChoice``."""
        transposed = [place.holder for place in self.places if any(kind.output_axis for kind in place.kinds)]
        return int(getattr(transposed[0], "groups", 1)) if transposed else 0

    def choice(self) -> ParameterChoice:
        """Return what is done with it."""
        (name, _, holder), *others = self.places
        reason = next((reason for rule in RULES if (reason := rule(self)) is not None), None)
        tied = tuple(place.name for place in others)
        kind = type(holder).__name__
        return ParameterChoice(name, kind, self.parameter, reason, tied, self.transposed_groups, self.sparse)


def _places(module: nn.Module) -> Iterator[tuple[nn.Parameter, list[Place]]]:
    """Yield each parameter once, with all its places."""
    found: dict[nn.Parameter, list[Place]] = {}
    for prefix, holder in module.named_modules():
        for local, parameter in holder.named_parameters(recurse=False):
            if isinstance(holder, SparseLayer) and local == "values":
                local = "weight"  # of the dense layer it stands for
            found.setdefault(parameter, []).append(Place(f"{prefix}.{local}" if prefix else local, local, holder))
    yield from found.items()


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Match a glob on any of the names; ``*.head.weight`` also finds a ``head.weight`` at the top."""
    plain = [plain_name(name) for name in names]
    return any(fnmatchcase(form, pattern) for name in (*names, *plain) for form in (name, f".{name}"))


# ---------------------------------------------------------------------- rules: why a parameter is left dense


def _no_weight(candidate: Candidate) -> str | None:
    """Biases, norms and scalars are never made sparse."""
    never = any(place.local.startswith("bias") or isinstance(place.holder, NORMS) for place in candidate.places)
    return _NO_WEIGHT if never or len(candidate.shape) < 2 else None


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
    others = [type(place.holder).__name__ for place in candidate.places if not place.by_default]
    return f"{others[0]}: only on request (include)" if others else None


def _frozen(candidate: Candidate) -> str | None:
    """What does not train stays as it is."""
    return None if candidate.parameter.requires_grad else FROZEN


def _not_real(candidate: Candidate) -> str | None:
    """There must be real numbers to set to 0."""
    real = candidate.parameter.is_floating_point() and math.prod(candidate.shape) > 0
    return None if real else "not a real-valued tensor with elements"


#: the first one that gives a reason counts
RULES = (_no_weight, _excluded, _not_included, _only_on_request, _frozen, _not_real)


# ---------------------------------------------------------------------- errors


def _refuse_lazy(candidate: Candidate) -> None:
    if isinstance(candidate.parameter, UninitializedParameter):
        name, _, holder = candidate.places[0]
        raise ValueError(
            f"{name} ({type(holder).__name__}) must have a shape when the fit starts, but is not initialized. Run "
            "an example through the module before, e.g. in __init__ or configure_model."
        )


def _refuse_sparse_gradients(candidate: Candidate) -> None:
    if any(isinstance(place.holder, _EMBEDDINGS) and place.holder.sparse for place in candidate.places):
        name, _, holder = candidate.places[0]
        raise ValueError(
            f"{name} ({type(holder).__name__}) must have dense gradients to be made sparse, but its layer has "
            f"sparse=True. Make the layer with sparse=False, or leave it out with exclude=[{name!r}]."
        )


def _refuse_unused(patterns: set[str], choices: Sequence[ParameterChoice]) -> None:
    if patterns:
        weights = [choice.name for choice in choices if len(choice.shape) >= 2]
        near = "".join(checks.did_you_mean(pattern, weights) for pattern in sorted(patterns))
        raise ValueError(
            f"include and exclude must match the names of weights, but {sorted(patterns)} match none. {near}"
            f"Biases and norms are never made sparse. The weights are: {weights}."
        )


# ---------------------------------------------------------------------- in words


def table(title: str, choices: Sequence[ParameterChoice], densities: Mapping[str, float] | None = None) -> str:
    """Return a readable table of what is sparse, what is not and why.

    Args:
        title: its first line.
        choices: all parameters.
        densities: those that are planned, by parameter name; None or empty: they are found in training.
    """
    rows = [("weight", "layer", "shape", "density", "training"), *_rows(choices, densities or {})]
    if not densities:
        rows = [row[:3] + row[4:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([title, *lines, _summary(choices)])


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
    sizes = [math.prod(choice.shape) for choice in choices if choice.reason is None]
    sparse, total = sum(sizes), sum(math.prod(choice.shape) for choice in choices)
    return f"{len(sizes)} weights, {sparse:,} of {total:,} parameters ({sparse / max(total, 1):.1%}) train sparse"
