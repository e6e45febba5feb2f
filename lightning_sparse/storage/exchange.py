"""The exchange of layers: dense ones of a module become truly sparse, as soon as the module is whole."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from lightning_sparse.compat.lightning import MisconfigurationException, Trainer
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.storage.store import Stored
from lightning_sparse.trainer.adopt import adopt
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.sparse import SparseWeight

__all__ = ["exchange_layers", "prefix"]


class _Store(Protocol):
    """What the exchange asks of a store."""

    method: Stored

    @property
    def exchanged(self) -> tuple[type[nn.Module], ...]: ...

    def weight(self, name: str, shape: Sequence[int], layer: nn.Module | None) -> SparseWeight: ...


@torch.no_grad()
def exchange_layers(store: _Store, trainer: Trainer, module: nn.Module) -> list[SparseWeight]:
    """Exchange the layers that a store's method has chosen; return their weights.

    Connections are drawn, or are those of an earlier fit of the same weights. Layers that an earlier fit has left
    sparse keep theirs.

    Raises:
        MisconfigurationException: a weight is not that of a plain layer that the store exchanges, or all layers are
            sparse already and the method cannot take their connections.
    """
    method = store.method
    choices = [choice for choice in method.choices_in(module) if choice.reason is None]
    if all(choice.sparse is not None for choice in choices):
        # an earlier fit left them so, or there are none; adopt looks whether they are what was asked for
        if choices and not method._weights:
            method.refuse_made_sparse([choice.name for choice in choices])
        return [store.weight(choice.name, choice.shape, choice.sparse) for choice in choices]
    _refuse_layers(store, module, choices)
    weights = [store.weight(c.name, c.shape, module.get_submodule(prefix(c.name))) for c in choices]
    with torch.device("cpu"):  # where draws are made, whatever the device that configure_model builds on
        _give_connections(method, weights, choices, trainer)
    return weights


def prefix(name: str) -> str:
    """Return the name of the layer that has a weight."""
    return name.rpartition(".")[0]


def _refuse_layers(store: _Store, module: nn.Module, choices: Sequence[ParameterChoice]) -> None:
    """Raise if a weight is not that of a plain layer that the store exchanges alone."""
    problems = []
    for choice in choices:
        path, _, local = choice.name.rpartition(".")
        if type(module.get_submodule(path)) not in store.exchanged or local != "weight":
            problems.append(f"{choice.name} ({choice.layer})")
        elif choice.tied:
            problems.append(f"{choice.name} ({choice.layer}: a sparse layer cannot share its weight)")
    if problems:
        plain = " and ".join(f"nn.{kind.__name__}" for kind in store.exchanged)
        raise MisconfigurationException(
            f"{store.method!r} can exchange plain {plain} layers only, not "
            f"{', '.join(problems)}. Leave them dense with exclude=[...], or use storage='masked'."
        )


def _give_connections(
    method: Stored, weights: Sequence[SparseWeight], choices: Sequence[ParameterChoice], trainer: Trainer
) -> None:
    """Give the layers the connections of an earlier fit of the same weights, or new ones."""
    earlier: dict[str, Weight] = dict(method._weights)
    shapes = {name: weight.shape for name, weight in earlier.items()}
    adoption = adopt(method, choices, shapes, False, lambda: _continues(method, weights, earlier))
    if adoption == "continued":
        for weight in weights:
            weight.start(earlier[weight.name].active_indices, torch.default_generator)
    else:
        method.draw(weights, trainer.strategy.broadcast(torch.initial_seed()))


def _continues(method: Stored, weights: Sequence[SparseWeight], earlier: Mapping[str, Weight]) -> bool:
    """Tell whether the dense weights are 0 wherever an earlier fit left them inactive."""
    if any(isinstance(weight, SparseWeight) and not weight.known for weight in earlier.values()):
        return False
    for weight in weights:
        assert isinstance(weight.layer, (nn.Linear, nn.Conv2d))
        W = weight.layer.weight
        if W.is_meta:
            return False
        active = earlier[weight.name].active_indices.to(W.device)
        nonzero = int(W.reshape(-1)[active].count_nonzero())
        if int(W.count_nonzero()) != nonzero or not method.continues(len(active), nonzero):
            return False
    return True
