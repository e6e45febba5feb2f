"""ThresholdStates: what an optimizer keeps for thresholds, in a method's own state.

Where processes hold some rows of each weight, the optimizer's state is saved and restored by the names that its
parameters have in the module, where thresholds have none. So they join the optimizer once its state has been restored,
what it keeps for them is left out of its state, and the method keeps that.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.optimizers import wrapped
from lightning_sparse.compat.shards import local
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["ThresholdStates", "place"]

#: of a threshold: what has a number for each of its elements, the names of that, and the rest
_EACH, _NAMES, _PLAIN = "each", "names", "plain"


class ThresholdStates:
    """What optimizers keep for thresholds that have joined them late.

    Attributes:
        apart: this is so; else the optimizers' own states have it.
    """

    def __init__(self) -> None:
        self.apart = False
        self._optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._restored: dict[str, Any] = {}  # until they join

    # ------------------------------------------------------------------ joining, and leaving

    def begin(self, apart: bool, resumed: bool) -> None:
        """Begin a fit, with what a checkpoint had if it is resumed; with states ``apart`` also if that has them so."""
        self._let_go()
        self._restored = self._restored if resumed else {}
        self.apart = apart or bool(self._restored)

    def join(self, method: Verbs, optimizer: Optimizer, ours: Callable[[], Collection[nn.Parameter]]) -> None:
        """Have the state of an optimizer leave out ``ours``, the thresholds that it has then.

        Raises:
            MisconfigurationException: it cannot have thresholds that are divided.
        """
        if optimizer in self._optimizers:
            return
        kind = type(optimizer).__name__
        if len(wrapped(optimizer)) > 1:
            raise MisconfigurationException(
                f"{method!r} cannot train thresholds that processes share with {kind}, which hands its step to another "
                "optimizer: what that keeps for them would be lost. Use SGD or AdamW by itself."
            )
        self._optimizers.append(optimizer)
        self._handles.append(optimizer.register_state_dict_post_hook(partial(_without, ours)))

    def restore(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Give an optimizer what a checkpoint has for the thresholds of weights."""
        for weight in weights:
            for key, found in self._restored.pop(weight.name, {}).items():
                own = {name: weight.thresholds.here(x).to(weight.latent.device) for name, x in found[_EACH].items()}
                divided = {name: weight.thresholds.divided(key, x.clone()) for name, x in own.items()}
                optimizer.state[weight.thresholds[key]] = {**found[_PLAIN], **divided}

    def release(self, weights: Mapping[str, LatentWeight]) -> None:
        """Take the thresholds out of the optimizers; keep what these had for them."""
        self._restored = self.state(weights) if self.apart else {}
        ours = {id(t) for weight in weights.values() for t in weight.thresholds.values.values()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                kept = [i for i, p in enumerate(group["params"]) if id(p) not in ours]
                for entry in ("params", "param_names"):
                    if entry in group:
                        group[entry] = [group[entry][i] for i in kept]
            for t in [t for t in optimizer.state if id(t) in ours]:
                del optimizer.state[t]
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizers, self._handles = [], []

    # ------------------------------------------------------------------ state

    def state_dict(self, weights: Mapping[str, LatentWeight]) -> dict[str, Any]:
        """Return what a method's state has of them: nothing where the optimizers' own states have it."""
        return {"optimizer": self.state(weights)} if self.apart else {}

    def state(self, weights: Mapping[str, LatentWeight]) -> dict[str, Any]:
        """Return what a checkpoint keeps: by weight, by threshold."""
        found: dict[str, Any] = {}
        for name, weight in weights.items():
            held = {
                key: _kept(optimizer.state[t], t)
                for key, t in weight.thresholds.values.items()
                for optimizer in self._optimizers
                if t in optimizer.state
            }
            found |= {name: held} if held else {}
        return {**self._restored, **found}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take up a state, for when the thresholds join."""
        self._restored = dict(state)

    def expect(self, state: Mapping[str, Any], weights: Mapping[str, LatentWeight]) -> None:
        """Make room for what a checkpoint has by shards, which is then read into what ``state`` returns."""
        self._restored = {
            name: {key: {_EACH: _room(weights[name], key, held[_NAMES])} for key, held in of.items()}
            for name, of in state.items()
            if name in weights
        }

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without optimizers."""
        return {"apart": False, "_optimizers": [], "_handles": [], "_restored": {}}


def place(weight: LatentWeight, key: str, group: dict[str, Any]) -> None:
    """Put a threshold into the param group of its weight, where it stood when the checkpoint was written."""
    t, places = weight.thresholds[key], weight.thresholds.places
    place = next((i for i, p in enumerate(group["params"]) if p is t), len(group["params"]))
    if places.setdefault(key, place) != place:
        raise MisconfigurationException(
            f"The checkpoint has the threshold of {weight.name} at index {places[key]} of its param group; "
            f"here it would be at index {place} and get another tensor's optimizer state. Give the Trainer the "
            "callbacks, and the optimizer the parameters, in the same order as when the checkpoint was written."
        )
    if place == len(group["params"]):
        group["params"].append(t)
        if "param_names" in group:
            group["param_names"].append(f"{weight.name}.{key}")


def _kept(state: Mapping[str, Any], t: nn.Parameter) -> dict[str, Any]:
    """Return what an optimizer keeps for a threshold: what is like it, their names, and the rest."""
    each = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.shape == t.shape}
    plain = {name: x for name, x in state.items() if name not in each and x is not None}
    return {_EACH: each, _NAMES: " ".join(each), _PLAIN: plain}


def _room(weight: LatentWeight, key: str, names: str) -> dict[str, Tensor]:
    t = local(weight.thresholds[key])
    return {name: weight.thresholds.divided(key, torch.zeros_like(t)) for name in names.split()}


def _without(
    ours: Callable[[], Collection[nn.Parameter]], optimizer: Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return the state of an optimizer without some of its parameters."""
    left_out = {id(t) for t in ours()}
    parameters = dict.fromkeys(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    numbers = {number for number, p in enumerate(parameters) if id(p) in left_out}
    return {
        **state,
        "state": {number: kept for number, kept in state["state"].items() if number not in numbers},
        "param_groups": [_group_without(group, numbers) for group in state["param_groups"]],
    }


def _group_without(group: Mapping[str, Any], numbers: Collection[int]) -> dict[str, Any]:
    kept = [i for i, number in enumerate(group["params"]) if number not in numbers]
    listed = {entry: [group[entry][i] for i in kept] for entry in ("params", "param_names") if entry in group}
    return {**group, **listed}
