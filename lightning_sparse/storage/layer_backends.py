"""LayerBackends: how each truly sparse layer computes: as a checkpoint says, as asked for, or as is quickest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_sparse.compat.lightning import Trainer, rank_zero_info, rank_zero_warn
from lightning_sparse.kernels import dispatch
from lightning_sparse.kernels.products import DENSE
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.storage.measure import Inputs, backends, choose, measure_all, ways
from lightning_sparse.trainer.guards import listed
from lightning_sparse.weights.sparse import SparseWeight

__all__ = ["LayerBackends"]


class LayerBackends:
    """The backends of the layers of one method, by name of their weights.

    Attributes:
        chosen: those that are known: of a checkpoint before the fit begins, of the layers here from then on.
        known: those of all layers are.
        inputs: what notes the inputs of the layers in the first batch, until they have been measured; else None.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        self.known = False
        self.inputs: Inputs | None = None

    def settle(self, weights: Sequence[SparseWeight]) -> None:
        """Have layers compute as the checkpoint says, or as is asked for; nothing is chosen for the others yet."""
        fixed = dispatch.wanted() != "auto" or torch.are_deterministic_algorithms_enabled()
        for weight in weights:
            name, layer = weight.name, weight.sparse
            here, saved = backends(layer), self.chosen.pop(name, None)
            if saved not in (None, DENSE, *here):
                rank_zero_warn(
                    f"The checkpoint was trained with the backend {saved!r} for {name}, which is not available "
                    f"here ({', '.join(here)}): the run continues, but not to the last bit as it would have."
                )
            elif saved is not None or fixed:
                self.chosen[name] = layer.backend = saved or here[0]
        self.known = not self._undecided(weights)

    def _undecided(self, weights: Sequence[SparseWeight]) -> dict[str, SparseLayer]:
        """Return the layers of weights for which nothing is chosen, by name of the weight."""
        return {weight.name: weight.sparse for weight in weights if weight.name not in self.chosen}

    def note_inputs(self, weights: Sequence[SparseWeight]) -> Inputs:
        """Note from now on what enters the layers for which nothing is chosen; return what ends it."""
        self.inputs = Inputs(self._undecided(weights))
        return self.inputs

    def measure(self, weights: Sequence[SparseWeight], trainer: Trainer, storage: str) -> None:
        """Measure, on the first process, how these layers compute their noted inputs most quickly, and tell."""
        assert self.inputs is not None
        self.inputs.close()
        layers = self._undecided(weights)
        seconds: dict[str, dict[str, float]] = {}
        if trainer.is_global_zero:
            seconds = measure_all(layers, self.inputs.found, ways, trainer.precision_plugin.forward_context)
        seconds, self.inputs = trainer.strategy.broadcast(seconds), None
        self.chosen |= choose(layers, seconds)
        self.known = True
        if seconds:
            rank_zero_info(f"storage={storage!r} computes as is quickest here: {_told(self.chosen, seconds)}.")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"backends": dict(self.chosen)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the backends of a store's state."""
        earlier = state_dict.get("backend")  # one for all layers, of earlier versions
        self.chosen = dict(state_dict.get("backends", dict.fromkeys(state_dict["weights"], earlier) if earlier else {}))
        self.known = False


def _told(chosen: Mapping[str, str], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Return in words which layers compute how, and how much more quickly than with dense weights."""
    parts = []
    for way in sorted({chosen[name] for name in seconds}):
        names = [name for name in seconds if chosen[name] == way]
        ratios = [seconds[name][way] / seconds[name][DENSE] for name in names if DENSE in seconds[name]]
        ends = dict.fromkeys(f"{ratio:.2g}" for ratio in (min(ratios), max(ratios))) if ratios else ()
        told = f" in {' to '.join(ends)} of the time with dense weights" if ratios else ""
        how = "dense weights, made for each pass" if way == DENSE else f"{way}{told}"
        parts.append(f"{listed(names)} with {how}")
    return "; ".join(parts)
