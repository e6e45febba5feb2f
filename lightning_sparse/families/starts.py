"""Starts: which connections a fit begins with, of a network made anew or of one that is there already."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat.compiled import plain_name
from lightning_sparse.compat.lightning import MisconfigurationException, rank_zero_info
from lightning_sparse.families.shares import floors, least, unit_counts
from lightning_sparse.layers.seen import behind_seen_norms
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, budget
from lightning_sparse.rules.matrices import Outputs, as_matrix
from lightning_sparse.rules.parts import together
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.rules.trained import looks_trained
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.trainer.mask_files import read_masks
from lightning_sparse.weights.base import Weight, all_finite

__all__ = [
    "INITIAL",
    "STARTS",
    "Start",
    "begin",
    "check_initial",
    "check_number",
    "made_anew",
    "refuse_found",
    "refuse_found_number",
    "refuse_made_sparse",
    "refuse_other_number",
    "refuse_other_pattern",
    "start",
    "warn_of_trained",
]

INITIAL = (
    'the connections to begin with. ``"random"``: drawn at random, for a network made anew. The others keep trained '
    'weights: ``"magnitude"``: the largest weights, as many of each layer as ``distribution`` gives; '
    '``"global_magnitude"``: the largest of all layers; ``"zeros"``: all but the zeros that are there; a file '
    "``NAME.safetensors`` that ``save_masks`` of another run has written. With the last two, ``sparsity=None`` takes "
    "as many connections as there are."
)
_FILE = ".safetensors"


class _Scaling(Protocol):
    """What the scale of a start asks of its method."""

    scale_init: bool


class _Held(Protocol):
    """What the scale of a start asks of a weight."""

    name: str
    outputs: Outputs

    @property
    def shape(self) -> tuple[int, ...]: ...


class _Method(Protocol):
    """What a start asks of its method."""

    initial: str
    pattern: Pattern
    pattern_name: str
    distribution: Distribution | Mapping[str, float]
    min_layer_density: float
    generator: Generator
    scale_init: bool
    _fit: Fit

    def units(self, weights: Sequence[Weight]) -> list[Weight]: ...

    def refuse_number(self, weights: Sequence[Weight]) -> None: ...

    def warn_once(self, message: str) -> None: ...


#: the flat positions, ascending, of each weight's connections (or units of the pattern), as many in all as the
#: sparsity, if given, leaves
Positions = Callable[[_Method, Sequence[Weight], float | None], Iterator[Tensor]]


@dataclass(frozen=True)
class Start:
    """One way to begin.

    Attributes:
        positions: chooses the connections.
        keeps_weights: the network is there already: its weights are chosen by what they are, and stay as they are.
        knows_number: it finds how many connections there are, not units of a pattern; the sparsity may be None.
    """

    positions: Positions
    keeps_weights: bool = True
    knows_number: bool = False


def begin(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> None:
    """Give weights their first connections, as ``method.initial`` says, as many as ``sparsity`` leaves to all."""
    first = start(method.initial)
    weights = weights if first.knows_number else method.units(weights)
    for weight, positions in zip(weights, first.positions(method, weights, sparsity), strict=True):
        weight.start(positions, method.generator)
        if method.scale_init and not first.keeps_weights:
            weight.scale_to_fan_in_()


def made_anew(
    method: _Scaling, module: nn.Module | None, weights: Sequence[_Held], values: Sequence[Tensor]
) -> set[str]:
    """Return the names of the weights whose first values a method is to scale; tell of those that look trained.

    Args:
        method: that keeps weights by what they are, or by what the loss says of them.
        module: that has the weights; None: its batch norms cannot be asked.
        weights: which.
        values: of each, of what is here.
    """
    if not method.scale_init:
        return set()
    outputs = {weight.name: weight.outputs.rows(weight.shape) for weight in weights}
    seen = behind_seen_norms(module, outputs) if module else set()
    looks = together(weights).total(*(looks_trained(W) for W in values))  # of some rows, where processes share them
    trained = [name for name, looks_so in zip(outputs, looks, strict=True) if name in seen or looks_so]
    if trained:
        rank_zero_info(f"{method!r} does not scale {', '.join(trained)} to the connections left: they look trained.")
    return outputs.keys() - set(trained)


def start(initial: str) -> Start:
    """Return the start of this name, or that from the file."""
    return STARTS[initial] if initial in STARTS else Start(partial(_of_file, initial), knows_number=True)


def check_initial(initial: str | os.PathLike[str]) -> None:
    """Raise unless it is the name of a start, or may be that of a file of masks."""
    if not isinstance(initial, (str, os.PathLike)) or not (initial in STARTS or os.fspath(initial).endswith(_FILE)):
        raise ValueError(
            f"initial must be one of {sorted(STARTS)}, or a file of masks, NAME{_FILE}, got {initial!r}. "
            "callback.save_masks(path) of another run writes one."
        )


# ---------------------------------------------------------------------- the starts


def check_number(sparsity: float | None, initial: str) -> None:
    """Raise if neither the sparsity nor the start tells the number of connections."""
    if sparsity is None and not start(initial).knows_number:
        raise ValueError(
            f"sparsity must be a number from 0 to 1 with initial={initial!r}, got None. Only initial='zeros' "
            "and a file of masks say how many connections there are."
        )


def _random(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> Iterator[Tensor]:
    """Draw as many of each layer as the distribution gives; note which weights look trained."""
    for weight, n in zip(weights, _shares(method, weights, sparsity), strict=True):
        if sparsity:
            method._fit.drawn[weight.name] = _looks_trained(weight.whole)
        yield method.pattern.draw(n, weight.shape, method.generator, weight.nonempty, weight.outputs, weight.part)


def _magnitude(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> Iterator[Tensor]:
    """Take the largest of each layer, as many as the distribution gives."""
    for weight, n in zip(weights, _shares(method, weights, sparsity), strict=True):
        yield _largest(method, weight, _finite(method, weight), n)


def _global_magnitude(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> Iterator[Tensor]:
    """Take the largest of all layers, but of each as many as ``min_layer_density`` asks for."""
    total = _total(weights, sparsity)
    given = [_finite(method, weight) for weight in weights]
    everywhere = [torch.ones_like(W, dtype=torch.bool) for W in given]
    at_least = floors(weights, method.min_layer_density, total, method.pattern)
    counts = method.pattern.count_global_top_k(weights, given, total, everywhere, at_least, torch.abs)
    for weight, W, n in zip(weights, given, method.pattern.counts(weights, counts), strict=True):
        yield _largest(method, weight, W, n)


def _largest(method: _Method, weight: Weight, W: Tensor, n: int) -> Tensor:
    """Return the positions of the ``n`` largest magnitudes of a weight that the pattern allows."""
    found = method.pattern.top_k(weight, select.first_of_rows(W.abs(), weight.nonempty), n)
    return weight.part.positions(select.positions(found))


def _zeros(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> Iterator[Tensor]:
    """Take all that is not 0."""
    for weight in weights:
        yield weight.part.positions(select.positions(_given(method, weight) != 0))


def _of_file(path: str, method: _Method, weights: Sequence[Weight], sparsity: float | None) -> Iterator[Tensor]:
    """Take those of another run's masks."""
    masks = read_masks(path)
    for weight in weights:
        _refuse_other_mask(method, path, weight, masks)
    unused = masks.keys() - {plain_name(weight.name) for weight in weights}
    if unused:
        method.warn_once(
            f"{method!r} leaves masks of the file unused: {sorted(unused)} are not among the weights that begin now."
        )
    for weight in weights:
        yield select.positions(masks.pop(plain_name(weight.name)))


#: the starts by the names of the argument ``initial``
STARTS: dict[str, Start] = {
    "random": Start(_random, keeps_weights=False),
    "magnitude": Start(_magnitude),
    "global_magnitude": Start(_global_magnitude),
    "zeros": Start(_zeros, knows_number=True),
}


# ---------------------------------------------------------------------- how many, and of what


def _total(weights: Sequence[Weight], sparsity: float | None) -> int:
    """Return the number of connections of all weights."""
    assert sparsity is not None, "the method has refused it"
    return budget(sparsity, sum(weight.size for weight in weights))


def _shares(method: _Method, weights: Sequence[Weight], sparsity: float | None) -> list[int]:
    """Return the number of connections of each weight."""
    total = _total(weights, sparsity)
    counts = unit_counts(weights, method.pattern, method.distribution, total, method.min_layer_density)
    return method.pattern.counts(weights, list(counts.values()))


def _looks_trained(weight: Weight) -> bool:
    return not weight.given.is_meta and looks_trained(weight.given)


def _given(method: _Method, weight: Weight) -> Tensor:
    """Return what the module has for a weight.

    Raises:
        MisconfigurationException: it is on the meta device.
    """
    W = weight.given
    if W.is_meta:
        raise MisconfigurationException(
            f"{method!r} begins with the weights that are there, but {weight.name} is on the meta device and has no "
            "values yet. Make the layer on a real device and load its weights, or use initial='random'."
        )
    return W


def _finite(method: _Method, weight: Weight) -> Tensor:
    """Return what the module has for a weight, to be ranked.

    Raises:
        MisconfigurationException: it is not finite.
    """
    W = _given(method, weight)
    if not weight.part.all(all_finite(W)):
        raise MisconfigurationException(
            f"{method!r} begins with the largest weights, but {weight.name} has values that are NaN or infinite. "
            "Load a checkpoint of before the training diverged, or use initial='random'."
        )
    return W


# ---------------------------------------------------------------------- errors and warnings


def refuse_found(method: _Method, weights: Sequence[Weight]) -> None:
    """Raise if the zeros are to be kept, and there are none, or if a layer, or a row, has too few connections."""
    empty = [w.name for w in weights if w.nonempty and not as_matrix(w.mask, w.nonempty).any(1).all()]
    if empty:
        raise MisconfigurationException(
            f"{method!r} must leave a connection in each row of {', '.join(empty)}, which is divided by its norm, as "
            "by weight_norm, but some begin with none: 0 / 0. Give another start, or leave it dense with exclude."
        )
    below = [w.name for w in method.units(weights) if w.num_active < least(w, method.min_layer_density)]
    if below:
        raise MisconfigurationException(
            f"{method!r} must leave every layer a density of min_layer_density={method.min_layer_density!r}, but "
            f"{', '.join(below)} begin with less. Lower it, or give another start."
        )
    if method.initial == "zeros" and not any(weight.num_inactive for weight in weights):
        raise MisconfigurationException(
            f"{method!r} keeps the zeros that are there, but {', '.join(weight.name for weight in weights)} have none. "
            "Load a sparse network before the fit, or give initial='magnitude' and a sparsity."
        )


def refuse_found_number(method: _Method, weights: Mapping[str, Weight]) -> None:
    """Raise if the number of connections was found, and is none to begin with."""
    if start(method.initial).knows_number:
        method.refuse_number([*weights.values()])


def refuse_other_number(method: _Method, weights: Sequence[Weight], sparsity: float | None, surplus: int) -> None:
    """Raise unless the weights have just the connections that the sparsity, if given, leaves, and the ``surplus``."""
    weights = method.units(weights)
    active = sum(weight.num_active for weight in weights)
    if sparsity is None or active == _total(weights, sparsity) + surplus:
        return
    remedy = (
        "sparsity=None to take these, or initial='magnitude' to choose others"
        if start(method.initial).knows_number
        else "the sparsity that the layers were made sparse with, or make them dense with "
        "lightning_sparse.storage.to_dense(module) to start afresh"
    )
    raise MisconfigurationException(
        f"The weights of {method!r} have {active} connections, sparsity={sparsity!r} asks for "
        f"{_total(weights, sparsity) + surplus}. Give {remedy}."
    )


def refuse_other_pattern(method: _Method, weights: Sequence[Weight]) -> None:
    """Raise unless the connections of all weights have the pattern."""
    if method.pattern.kind == "unstructured":
        return
    others = [w.name for w in weights if not w.part.all(method.pattern.fits(w.mask, w.outputs))]
    if others:
        raise MisconfigurationException(
            f"{method!r} must have weights of pattern={method.pattern_name!r}, but those that it begins with in "
            f"{', '.join(others)} are not. Give initial='magnitude' and a sparsity to choose others, or train without "
            "the pattern."
        )


def refuse_made_sparse(method: _Method, names: Sequence[str]) -> None:
    """Raise if connections are to be chosen where layers that are sparse already have theirs."""
    if start(method.initial).keeps_weights and method.initial != "zeros":
        raise MisconfigurationException(
            f"{method!r} chooses connections, but {', '.join(names)} are in sparse layers, which have theirs. Make "
            "them dense with lightning_sparse.storage.to_dense(module), or give initial='zeros' to keep what they have."
        )


def _refuse_other_mask(method: _Method, path: str, weight: Weight, masks: Mapping[str, Tensor]) -> None:
    """Raise unless there is a mask of the weight's name and shape."""
    name = plain_name(weight.name)
    if name not in masks:
        raise MisconfigurationException(
            f"{method!r} needs a mask of {name!r}, but {path!r} has none: it has {sorted(masks)}. Choose the same "
            "weights with include and exclude as the run that has written it."
        )
    if tuple(masks[name].shape) != weight.shape:
        raise MisconfigurationException(
            f"{method!r} needs a mask of {name!r} of shape {weight.shape}, but that of {path!r} is of shape "
            f"{tuple(masks[name].shape)}. Give a file of the same network, or leave the weight out with exclude."
        )


def warn_of_trained(method: _Method, module: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Warn if random connections have been drawn in place of a trained network's, and most of it is lost."""
    outputs = {name: weights[name].outputs.rows(weights[name].shape) for name in method._fit.drawn}
    seen = behind_seen_norms(module, outputs)
    trained = [name for name, looks in method._fit.drawn.items() if looks or name in seen]
    method._fit.drawn.clear()
    if trained:
        share = sum(weights[name].num_active for name in trained) / sum(weights[name].size for name in trained)
        method.warn_once(
            f"{method!r} draws its connections at random and sets all other weights to 0, but {', '.join(trained)} "
            f"look trained: {share:.1%} of them stay. To keep the largest weights, give initial='magnitude'; to keep "
            "the zeros of a sparse network, initial='zeros'."
        )
