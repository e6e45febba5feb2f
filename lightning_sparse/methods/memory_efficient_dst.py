"""Memory Efficient Dynamic Sparse Training (anonymous authors, under review).

Section 3, Eqs. 1-7, and Appendix C. Decisions: connections dropped in an update belong to those that were active, so
they are not sampled; the step that moves connections goes on, and the new ones, which start at 0, take their first
step with the gradient they were chosen by. That gradient is the dense one, read at the sampled positions alone: with
masks it is there anyway, averaged over processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import checks, masks, sampling
from lightning_sparse.distributions import apportion, share
from lightning_sparse.endpoints import Activity, SynapticFlow, readable
from lightning_sparse.layers import as_matrix, write_matrix
from lightning_sparse.masked import MaskedWeight
from lightning_sparse.prune_and_grow import PruneAndGrow

__all__ = ["MemoryEfficientDST"]

HEURISTICS = ("random", "grabo", "synflow")


class MemoryEfficientDST(PruneAndGrow):
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
        options: ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import MemoryEfficientDST
        >>> callback = MemoryEfficientDST(sparsity=0.98, heuristic="grabo", subset_multiplier=10)

    Reference:
        "Memory Efficient Dynamic Sparse Training", under double-blind review.
    """

    _watched: dict[int, Activity | SynapticFlow]

    def __init__(
        self,
        sparsity: float,
        heuristic: str = "grabo",
        subset_multiplier: float = 10,
        drop_fraction: float = 0.2,
        update_every: int | None = 1000,
        stop_at: float = 0.6,
        distribution: str | Mapping[str, float] = "uniform",
        scale_init: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, drop_fraction, "cosine", update_every, stop_at, distribution=distribution, **options)
        checks.one_of(HEURISTICS, heuristic=heuristic)
        checks.at_least(1, "With 1 all that is sampled is grown.", subset_multiplier=subset_multiplier)
        self.heuristic = heuristic
        self.subset_multiplier = subset_multiplier
        self.scale_init = scale_init
        self._watched = {}

    def initial_masks(self, weights: Sequence[MaskedWeight]) -> None:
        """Draw random masks, and scale the weights to the fan-in they leave."""
        super().initial_masks(weights)
        for weight in weights if self.scale_init else ():
            scale_to_fan_in_(weight.W, weight.mask, weight.transposed_groups)

    def update(self, weights: Sequence[MaskedWeight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of all layers and grow the largest ``|dP|`` of all their subsets."""
        kept = [min(self.least(weight), weight.active) for weight in weights]
        active, room = [weight.active for weight in weights], [weight.room for weight in weights]
        n = min(share(fraction, sum(active)), sum(active) - sum(kept), sum(room))  # |P|
        dropped = _smallest(weights, n, kept)
        subsets = self.subsets(weights, min(share(self.subset_multiplier, n), sum(room)))
        gradients = [weight.dP.reshape(-1)[subset].abs() for weight, subset in zip(weights, subsets, strict=True)]
        best = masks.global_top_k(gradients, n, [_all(gradient) for gradient in gradients], [0] * len(weights))
        for weight, drop, subset, grow in zip(weights, dropped, subsets, best, strict=True):
            weight.change(drop, _marked(subset[grow], weight.mask))

    def subsets(self, weights: Sequence[MaskedWeight], n: int) -> list[Tensor]:
        """Draw ``n`` inactive connections in all, in proportion to the layers' sizes: flat positions, ascending."""
        sizes, room = [weight.mask.numel() for weight in weights], [weight.room for weight in weights]
        endpoints = self._endpoints(weights)
        subsets = []
        for weight, count in zip(weights, apportion(n, sizes, room), strict=True):
            taken = weight.mask.reshape(-1).nonzero().squeeze(1).cpu()
            ends = endpoints.get(weight.name, {})
            subset = sampling.subset(count, taken, weight.mask.shape, self.generator, **ends)
            subsets.append(subset.to(weight.mask.device))
        return subsets

    # ------------------------------------------------------------------ the endpoints' distributions

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the layers if the next step moves connections."""
        self._watch()

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Move connections if they are due, and watch no longer."""
        try:
            super().before_step(optimizer, share, scale)
        finally:
            self._unwatch([id(optimizer)])

    def after_step(self, optimizer: Optimizer) -> None:
        """Bring back exact zeros, and watch the layers if the next step moves connections: it may be in this batch."""
        super().after_step(optimizer)
        self._watch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave effective weights and no hooks behind."""
        super().on_exception(trainer, pl_module, exception)
        self._unwatch(list(self._watched))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the hooks, too."""
        return {**super().__getstate__(), "_watched": {}}

    def _release(self) -> None:
        super()._release()
        self._unwatch(list(self._watched))

    def _watch(self) -> None:
        if self.heuristic == "random" or self._module is None:
            return
        for key, pool in self._pools.items():
            if pool.weights and key not in self._watched and (pool.due or self.is_due(pool)):
                names = [weight.name for weight in pool.weights]
                if self.heuristic == "grabo":
                    self._watched[key] = Activity(readable(self._module, names))
                else:
                    self._watched[key] = SynapticFlow(self._module, names)

    def _unwatch(self, keys: Sequence[int]) -> None:
        for key in keys:
            if key in self._watched:
                self._watched.pop(key).close()

    def _endpoints(self, weights: Sequence[MaskedWeight]) -> dict[str, dict[str, Any]]:
        """Return ``f``, ``g`` and the number of groups by the weights' names, the same on all processes."""
        watched = self._watched.get(id(weights[0].optimizer))
        if watched is None:
            return {}
        sums = watched.sums()
        unseen = [weight.name for weight in weights if not watched.calls.get(weight.name)]
        if unseen:
            self._warn_once(
                f"{type(self).__name__} draws the endpoints of some weights uniformly: heuristic={self.heuristic!r} "
                f"can tell them only where training_step calls a linear layer or a convolution as a module that alone "
                f"holds the weight, not for {unseen}."
            )
        if sums:
            ends = [end for pair in sums.values() for end in pair]
            assert self._trainer is not None
            whole = self._trainer.strategy.reduce(torch.cat(ends), reduce_op="sum")
            parts = iter(whole.split([len(end) for end in ends]))
            sums = {name: (next(parts), next(parts)) for name in sums}
        return {
            weight.name: {
                "f": sampling.probabilities(sums[weight.name][0]),
                "g": sampling.probabilities(sums[weight.name][1]),
                "groups": len(sums[weight.name][0]) // weight.mask.shape[1],
            }
            for weight in weights
            if weight.name in sums
        }


def scale_to_fan_in_(W: Tensor, mask: Tensor, transposed_groups: int = 0) -> None:
    """Multiply the weights of each neuron by the square root of its fan-in over the number of its active weights.

    The initialisation of Evci et al. (2019, "The difficulty of training sparse neural networks") by way of a dense
    one: what standard initialisations divide by the square root of the fan-in is divided by that of the actual one.
    """
    rows = as_matrix(W, transposed_groups)
    fan_in = as_matrix(mask, transposed_groups).sum(1, keepdim=True).clamp(min=1)
    rows.mul_((rows.shape[1] / fan_in).sqrt())
    write_matrix(W, rows, transposed_groups)


def _smallest(weights: Sequence[MaskedWeight], n: int, kept: Sequence[int]) -> list[Tensor]:
    """Mark the ``n`` active connections of smallest ``|W|`` of all layers, but leave in each the largest ``kept``."""
    magnitudes = [weight.W[weight.mask].abs() for weight in weights]
    total = sum(len(magnitude) for magnitude in magnitudes)
    staying = masks.global_top_k(magnitudes, total - n, [_all(magnitude) for magnitude in magnitudes], kept)
    return [
        torch.zeros_like(weight.mask).masked_scatter_(weight.mask, ~stays)
        for weight, stays in zip(weights, staying, strict=True)
    ]


def _all(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def _marked(positions: Tensor, like: Tensor) -> Tensor:
    """Return a boolean tensor, shaped ``like`` another, that is True at flat positions."""
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[positions] = True
    return mask.view(like.shape)
