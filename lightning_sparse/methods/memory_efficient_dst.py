"""Memory Efficient Dynamic Sparse Training (anonymous authors, under review).

Section 3, Eqs. 1-7, and Appendix C. Decisions: connections dropped in an update belong to those that were active, so
they are not sampled; the step that moves connections goes on, and the new ones, which start at 0, take their first
step with the gradient they were chosen by. With masks that is the dense one, which is there anyway, averaged over
processes; with ``storage="sparse"`` it is computed for the sampled positions alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.unit_activity import Activity, Hooks, SynapticFlow, readable
from lightning_sparse.rules import sampling, select
from lightning_sparse.rules.budgets import Distribution, apportion, least, portion
from lightning_sparse.weights.base import Weight

__all__ = ["MemoryEfficientDST"]

Heuristic = Literal["random", "grabo", "synflow"]


class MemoryEfficientDST(PruneAndGrow):
    """Memory Efficient DST: drop the smallest weights of all, grow the largest gradients of a sampled subset.

    An update drops ``|P|`` connections of smallest ``|W|``, whatever their layer. In each layer it samples inactive
    connections ``(a, b)``, input ``a ~ f`` and output ``b ~ g``, in proportion to the layer's size and
    ``subset_multiplier |P|`` in all; of these it grows the ``|P|`` of largest ``|dP|``. At the start of a fit the
    weights of each neuron are multiplied by the square root of its dense fan-in over its actual one.

    Example:
        >>> from lightning_sparse import MemoryEfficientDST
        >>> callback = MemoryEfficientDST(sparsity=0.98, heuristic="grabo", subset_multiplier=10)

    Reference:
        "Memory Efficient Dynamic Sparse Training", under double-blind review.
    """

    heuristic: Heuristic = option(
        default="grabo",
        doc='what ``f`` and ``g`` are: ``"random"``: uniform; ``"grabo"``: in proportion to ``sum |h|`` over the '
        'inputs and ``sum |delta|`` over the gradients of the outputs; ``"synflow"``: the flow of ones through '
        "``|W|``, from the input to ``a`` and from ``b`` to the output.",
    )
    subset_multiplier: float = option(
        default=10,
        check=partial(checks.at_least, 1, "With 1 all that is sampled is grown."),
        doc="number of connections sampled for each one moved, at least 1.",
    )
    drop_fraction: float = option(
        default=0.2, doc="share of the connections that the first update would drop, in (0, 1]."
    )
    update_every: int | None = 1000
    stop_at: float = 0.6
    distribution: Distribution | Mapping[str, float] = "uniform"
    scale_init: bool = option(
        default=True,
        doc="scale the weights a fit starts with to the fan-in that is left; False if they are trained ones.",
    )

    resizes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}  # what goes and what comes, by layer, within an update

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Draw random masks, and scale the weights to the fan-in they leave."""
        super().initial_masks(weights)
        for weight in weights if self.scale_init and not self.keeps_weights else ():
            weight.scale_to_fan_in_()

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of all layers and grow the largest ``|dP|`` of all their subsets."""
        kept = [min(least(self.min_layer_density, weight.size), weight.num_active) for weight in weights]
        active, room = sum(weight.num_active for weight in weights), sum(weight.num_inactive for weight in weights)
        n = min(portion(fraction, active), active - sum(kept), room)  # |P|
        staying = largest([weight.magnitudes for weight in weights], active - n, kept)
        subsets = self.subsets(weights, min(portion(self.subset_multiplier, n), room))
        gradients = [weight.gradient_at(subset).abs() for weight, subset in zip(weights, subsets, strict=True)]
        best = largest(gradients, n, [0] * len(weights))
        drops = []
        for weight, stays, subset, grows in zip(weights, staying, subsets, best, strict=True):
            dropped = weight.active_indices.cpu()[~stays.cpu()]
            self._chosen[weight.name] = dropped, subset[grows.to(subset.device)]
            drops.append(len(dropped))
        self.rewire(weights, drops, scale)

    def drop(self, weight: Weight, n: int, scale: float) -> Tensor:
        """Drop what lost among all layers."""
        return self._chosen[weight.name][0]

    def grow_counts(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Give each layer as many as it won among all layers."""
        return [len(self._chosen[weight.name][1]) for weight in weights]

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow what won among all layers."""
        return self._chosen.pop(weight.name)[1]

    def subsets(self, weights: Sequence[Weight], n: int) -> list[Tensor]:
        """Draw ``n`` inactive connections in all, in proportion to the layers' sizes: flat positions, ascending."""
        sizes, room = [weight.size for weight in weights], [weight.num_inactive for weight in weights]
        endpoints = self._endpoints(weights)
        subsets = []
        for weight, count in zip(weights, apportion(n, sizes, room), strict=True):
            ends = endpoints.get(weight.name, {})
            active = weight.active_indices.cpu()
            subsets.append(sampling.subset(count, active, weight.shape, self.generator, **ends))
        return subsets

    # ------------------------------------------------------------------ the endpoints' distributions

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Listen to what the heuristic needs, too."""
        listeners = super().watchers(weights)
        if self.heuristic == "random":
            return listeners
        assert self._fit.module is not None
        names = [weight.name for weight in weights]
        if self.heuristic == "grabo":
            return [*listeners, Activity(readable(self._fit.module, names))]
        return [*listeners, SynapticFlow(self._fit.module, names)]

    def _endpoints(self, weights: Sequence[Weight]) -> dict[str, dict[str, Any]]:
        """Return ``f``, ``g`` and the number of groups by the weights' names, the same on all processes."""
        watched = self._watch.of(weights[0].optimizer, Activity, SynapticFlow)
        if watched is None:
            return {}
        sums = watched.sums()
        unseen = [weight.name for weight in weights if not watched.calls.get(weight.name)]
        if unseen:
            self.warn_once(
                f"{self!r} draws the endpoints of some weights uniformly: heuristic={self.heuristic!r} "
                f"can tell them only where training_step calls a linear layer or a convolution as a module that alone "
                f"holds the weight, not for {unseen}."
            )
        if sums:
            of_units = [end for pair in sums.values() for end in pair]
            assert self._fit.trainer is not None
            whole = self._fit.trainer.strategy.reduce(torch.cat(of_units), reduce_op="sum")
            parts = iter(whole.split([len(end) for end in of_units]))
            sums = {name: (next(parts), next(parts)) for name in sums}
        return {
            weight.name: {
                "f": sampling.probabilities(sums[weight.name][0]),
                "g": sampling.probabilities(sums[weight.name][1]),
                "groups": len(sums[weight.name][0]) // weight.shape[1],
            }
            for weight in weights
            if weight.name in sums
        }


def largest(scores: Sequence[Tensor], k: int, at_least: Sequence[int]) -> list[Tensor]:
    """Mark the ``k`` largest scores of all layers together, but in each its ``at_least`` largest."""
    return select.global_top_k(scores, k, [torch.ones_like(score, dtype=torch.bool) for score in scores], at_least)
