"""Memory Efficient Dynamic Sparse Training (anonymous authors, under review).

Section 3, Eqs. 1-7, and Appendix C. Decisions: connections dropped in an update belong to those that were active, so
they are not sampled; the step that moves connections goes on, and the new ones, which start at 0, take their first
step with the gradient they were chosen by. With masks that is the dense one, which is there anyway, averaged over
processes; with ``storage="sparse"`` it is computed for the sampled positions alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.unit_activity import Activity, Hooks, SynapticFlow, readable
from lightning_sparse.rules import sampling, select
from lightning_sparse.rules.budgets import Distribution, apportion, share
from lightning_sparse.storage.sparse import SparseStorage
from lightning_sparse.trainer.callback import Storage
from lightning_sparse.weights.base import Weight

__all__ = ["MemoryEfficientDST"]

Heuristic = Literal["random", "grabo", "synflow"]


class MemoryEfficientDST(SparseStorage, PruneAndGrow):
    """Memory Efficient DST: drop the smallest weights of all, grow the largest gradients of a sampled subset.

    An update drops ``|P|`` connections of smallest ``|W|``, whatever their layer. In each layer it samples inactive
    connections ``(a, b)``, input ``a ~ f`` and output ``b ~ g``, in proportion to the layer's size and
    ``subset_multiplier |P|`` in all; of these it grows the ``|P|`` of largest ``|dP|``. At the start of a fit the
    weights of each neuron are multiplied by the square root of its dense fan-in over its actual one.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        heuristic: what ``f`` and ``g`` are: ``"random"``: uniform; ``"grabo"``: in proportion to ``sum |h|`` over the
            inputs and ``sum |delta|`` over the gradients of the outputs; ``"synflow"``: the flow of ones through
            ``|W|``, from the input to ``a`` and from ``b`` to the output.
        subset_multiplier: number of connections sampled for each one moved, at least 1.
        drop_fraction: share of the connections that the first update would drop, in (0, 1]; falls by a cosine to 0.
        update_every: number of optimizer steps from update to update; None: at the first step of each epoch but the
            first.
        stop_at: share of the training after which connections stay, in (0, 1].
        distribution: how the active weights are divided among layers at first.
        scale_init: scale the weights a fit starts with to the fan-in that is left; False if they are trained ones.
        storage: ``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in
            memory and time in proportion to them (linear layers and 2-d convolutions only).
        options: ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`; with ``storage="sparse"`` also
            ``plain_checkpoints``; see :class:`~lightning_sparse.storage.sparse.SparseStorage`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import MemoryEfficientDST
        >>> callback = MemoryEfficientDST(sparsity=0.98, heuristic="grabo", subset_multiplier=10)

    Reference:
        "Memory Efficient Dynamic Sparse Training", under double-blind review.
    """

    resizes = True

    def __init__(
        self,
        sparsity: float,
        heuristic: Heuristic = "grabo",
        subset_multiplier: float = 10,
        drop_fraction: float = 0.2,
        update_every: int | None = 1000,
        stop_at: float = 0.6,
        distribution: Distribution | Mapping[str, float] = "uniform",
        scale_init: bool = True,
        storage: Storage = "masked",
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity,
            drop_fraction,
            "cosine",
            update_every,
            stop_at,
            distribution=distribution,
            storage=storage,
            **options,
        )
        checks.one_of(get_args(Heuristic), heuristic=heuristic)
        checks.at_least(1, "With 1 all that is sampled is grown.", subset_multiplier=subset_multiplier)
        self.heuristic = heuristic
        self.subset_multiplier = subset_multiplier
        self.scale_init = scale_init

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Draw random masks, and scale the weights to the fan-in they leave."""
        super().initial_masks(weights)
        for weight in weights if self.scale_init else ():
            weight.scale_to_fan_in_()

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of all layers and grow the largest ``|dP|`` of all their subsets."""
        kept = [min(self.least(weight), weight.active) for weight in weights]
        active, room = [weight.active for weight in weights], [weight.room for weight in weights]
        n = min(share(fraction, sum(active)), sum(active) - sum(kept), sum(room))  # |P|
        dropped = _smallest(weights, n, kept)
        subsets = self.subsets(weights, min(share(self.subset_multiplier, n), sum(room)))
        gradients = [weight.gradient_at(subset).abs() for weight, subset in zip(weights, subsets, strict=True)]
        best = select.global_top_k(gradients, n, [_all(gradient) for gradient in gradients], [0] * len(weights))
        for weight, drop, subset, grow in zip(weights, dropped, subsets, best, strict=True):
            weight.exchange(weight.positions[drop.cpu()], subset[grow.to(subset.device)])

    def subsets(self, weights: Sequence[Weight], n: int) -> list[Tensor]:
        """Draw ``n`` inactive connections in all, in proportion to the layers' sizes: flat positions, ascending."""
        sizes, room = [weight.size for weight in weights], [weight.room for weight in weights]
        endpoints = self._endpoints(weights)
        subsets = []
        for weight, count in zip(weights, apportion(n, sizes, room), strict=True):
            ends = endpoints.get(weight.name, {})
            subsets.append(sampling.subset(count, weight.positions, weight.shape, self.generator, **ends))
        return subsets

    # ------------------------------------------------------------------ the endpoints' distributions

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Listen to what the heuristic needs, too."""
        listeners = super().watchers(weights)
        if self.heuristic == "random":
            return listeners
        assert self._module is not None
        names = [weight.name for weight in weights]
        if self.heuristic == "grabo":
            return [*listeners, Activity(readable(self._module, names))]
        return [*listeners, SynapticFlow(self._module, names)]

    def _endpoints(self, weights: Sequence[Weight]) -> dict[str, dict[str, Any]]:
        """Return ``f``, ``g`` and the number of groups by the weights' names, the same on all processes."""
        listeners = self._hooks.get(id(weights[0].optimizer), [])
        ends = [listener for listener in listeners if isinstance(listener, (Activity, SynapticFlow))]
        if not ends:
            return {}
        (watched,) = ends
        sums = watched.sums()
        unseen = [weight.name for weight in weights if not watched.calls.get(weight.name)]
        if unseen:
            self._warn_once(
                f"{type(self).__name__} draws the endpoints of some weights uniformly: heuristic={self.heuristic!r} "
                f"can tell them only where training_step calls a linear layer or a convolution as a module that alone "
                f"holds the weight, not for {unseen}."
            )
        if sums:
            of_units = [end for pair in sums.values() for end in pair]
            assert self._trainer is not None
            whole = self._trainer.strategy.reduce(torch.cat(of_units), reduce_op="sum")
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


def _smallest(weights: Sequence[Weight], n: int, kept: Sequence[int]) -> list[Tensor]:
    """Mark the ``n`` smallest ``|W|`` among all layers' active connections, but in each not the ``kept`` largest."""
    magnitudes = [weight.magnitudes for weight in weights]
    total = sum(len(magnitude) for magnitude in magnitudes)
    staying = select.global_top_k(magnitudes, total - n, [_all(magnitude) for magnitude in magnitudes], kept)
    return [~stays for stays in staying]


def _all(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)
