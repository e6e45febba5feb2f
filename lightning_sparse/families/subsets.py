"""Subsets: the inactive connections ``(a, b)`` that layers sample, input ``a ~ f`` and output ``b ~ g`` (GSE, Sec. 3).

What ``f`` and ``g`` are is a heuristic's: uniform, or made of what is seen of the layers in the batch before. All
processes draw the same.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from lightning_sparse.families.watch import Watch
from lightning_sparse.layers.unit_activity import Activity, GradientSketch, Hooks, SynapticFlow, readable
from lightning_sparse.rules import sampling, ties
from lightning_sparse.rules.budgets import apportion, portion
from lightning_sparse.rules.parts import together
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.base import Weight

__all__ = ["Heuristic", "Subset", "Subsets", "largest", "subset_counts"]

Heuristic = Literal["random", "grabo", "graest", "synflow"]
Subset = Literal["size", "active"]


class _Method(Protocol):
    """What subsets ask of their method."""

    heuristic: Heuristic
    generator: Generator
    _fit: Fit
    _watch: Watch

    def warn_once(self, message: str) -> None: ...


class Subsets:
    """The subsets of the layers of one method.

    Args:
        method: whose ``heuristic`` tells the distributions of inputs and outputs.
    """

    def __init__(self, method: _Method) -> None:
        self.method = method

    def listeners(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Return what listens to the layers of ``weights``, until ``draw``, as the heuristic needs."""
        module, heuristic = self.method._fit.module, self.method.heuristic
        if heuristic == "random":
            return []
        assert module is not None
        names = [weight.name for weight in weights]
        if heuristic == "grabo":
            return [Activity(readable(module, names))]
        if heuristic == "graest":
            return [GradientSketch(readable(module, names), self._seed_of_signs())]
        return [SynapticFlow(module, names)]

    def _seed_of_signs(self) -> int:
        """Return a number of this update and process; the generator stays where it is, as a step may be repeated."""
        ahead = torch.Generator()
        ahead.set_state(self.method.generator.get_state())
        assert self.method._fit.trainer is not None
        return int(torch.randint(1 << 62, (1,), generator=ahead)) + self.method._fit.trainer.global_rank

    def draw(self, weights: Sequence[Weight], counts: Sequence[int]) -> list[Tensor]:
        """Draw so many inactive connections of each layer: flat positions, ascending."""
        endpoints, generator = self.endpoints(weights), self.method.generator
        subsets = []
        for weight, count in zip(weights, counts, strict=True):
            ends = {"shape": weight.shape, **endpoints.get(weight.name, {})}
            taken = weight.active_indices.cpu()
            subsets.append(sampling.subset(count, taken, generator=generator, where=weight.part, **ends))
        return subsets

    def endpoints(self, weights: Sequence[Weight]) -> dict[str, dict[str, Any]]:
        """Return ``f``, ``g``, groups and shape by the weights' names, the same on all processes."""
        watched = self.method._watch.of(weights[0].optimizer, Activity, SynapticFlow)
        if watched is None:
            return {}
        sums = watched.sums()
        unseen = [weight.name for weight in weights if not watched.calls.get(weight.name)]
        if unseen:
            self.method.warn_once(
                f"{self.method!r} draws the endpoints of some weights uniformly: heuristic={self.method.heuristic!r} "
                f"needs a linear layer or a convolution that training_step calls as a module, and whose weight no "
                f"other layer shares. That is not so for {unseen}."
            )
        if sums:
            of_units = [end for pair in sums.values() for end in pair]
            assert self.method._fit.trainer is not None
            whole = self.method._fit.trainer.strategy.reduce(torch.cat(of_units), reduce_op="sum")
            parts = iter(whole.split([len(end) for end in of_units]))
            sums = {name: (next(parts), next(parts)) for name in sums}
        ends = {}
        for weight in weights:
            if weight.name in sums:
                shape = (weight.shape[0], math.prod(weight.shape[1:])) if watched.by_kernel else weight.shape
                f, g = (sampling.probabilities(side.abs()) for side in sums[weight.name])
                ends[weight.name] = {"f": f, "g": g, "groups": len(f) // shape[1], "shape": shape}
        return ends


def subset_counts(weights: Sequence[Weight], n: int, subset: Subset, multiplier: float) -> list[int]:
    """Return how many inactive connections each layer samples, for ``n`` that move in all.

    Args:
        weights: of the layers.
        n: how many connections move.
        subset: ``"size"``: ``multiplier n`` in all, in proportion to the layers' sizes; ``"active"``: ``multiplier``
            for each active connection, and all that are inactive in a layer that is half dense or more.
        multiplier: above 0.
    """
    room = [weight.num_inactive for weight in weights]
    if subset == "size":
        return apportion(min(portion(multiplier, n), sum(room)), [weight.size for weight in weights], room)
    wanted = [portion(multiplier, weight.num_active) for weight in weights]
    half_dense = [2 * weight.num_active >= weight.size for weight in weights]
    return [free if whole else min(k, free) for k, free, whole in zip(wanted, room, half_dense, strict=True)]


def largest(weights: Sequence[Weight], positions: Sequence[Tensor], scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return those of flat positions, ascending, that have the ``k`` largest scores of all layers, for each layer."""
    orders = [ties.at(places, weight.shape) for weight, places in zip(weights, positions, strict=True)]
    best = together(weights).global_top_k(scores, k, orders)
    return [places.index_select(0, won.to(places.device)) for places, won in zip(positions, best, strict=True)]
