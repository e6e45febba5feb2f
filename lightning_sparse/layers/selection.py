"""Which parameters of a module are weights to make sparse, and why the others are not."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sparse.compat import checks
from lightning_sparse.compat.torch_private import RunningNorm
from lightning_sparse.layers import transforms
from lightning_sparse.layers.choices import ParameterChoice, matches, patterns, table
from lightning_sparse.layers.kinds import LayerKind, kind_name, kind_of
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.layers.transforms import Transform
from lightning_sparse.rules.matrices import FIRST, Outputs

__all__ = [
    "FROZEN",
    "NORMS",
    "RULES",
    "ParameterChoice",
    "patterns",
    "select_parameters",
    "table",
]


NORMS = (RunningNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

#: reason of a parameter that does not train
FROZEN = "frozen"
_NO_WEIGHT = "bias, norm or scalar"


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
        return kind_of(self.layer)

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
        return {pattern for pattern in (*(self.include or ()), *self.exclude) if matches(pattern, names)}

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
            kind=kind_name(first.layer),
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
    others = [kind_name(place.layer) for place in candidate.places if not place.by_default]
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
            f"{first.name} ({kind_name(first.layer)}) must have a shape when the fit starts, but is not initialized. "
            "Run an example through the module before, e.g. in __init__ or configure_model."
        )


def _refuse_sparse_gradients(candidate: Candidate) -> None:
    if any(isinstance(place.layer, _EMBEDDINGS) and place.layer.sparse for place in candidate.places):
        first = candidate.places[0]
        raise ValueError(
            f"{first.name} ({kind_name(first.layer)}) must have dense gradients to be made sparse, but its layer has "
            f"sparse=True. Make the layer with sparse=False, or leave it out with exclude=[{first.name!r}]."
        )


def _refuse_other_dimensions(candidate: Candidate) -> None:
    for place in candidate.places:
        axis, dimensions = place.weight_of.out_axis if place.weight_of else 0, len(candidate.shape)
        if not -dimensions <= axis < dimensions:
            raise ValueError(
                f"{place.name} ({kind_name(place.layer)}) must have the dimension out_axis={axis} that register_layer "
                f"was given, but its shape is {candidate.shape}. Name other weights, or another out_axis."
            )


def _refuse_unused(patterns: set[str], choices: Sequence[ParameterChoice]) -> None:
    if patterns:
        weights = [choice.name for choice in choices if choice.is_weight]
        near = "".join(checks.did_you_mean(pattern, weights) for pattern in sorted(patterns))
        matched = [choice for choice in choices if any(matches(pattern, [choice.name]) for pattern in patterns)]
        others = "".join(f"{c.name} cannot be: {c.reason}. " for c in matched if c.is_weight and c.reason is not None)
        raise ValueError(
            f"include and exclude must match the names of weights, but {sorted(patterns)} match none. {near}"
            f"Biases, norms and gains are never made sparse. {others}The weights are: {weights}."
        )
