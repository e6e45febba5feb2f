"""TopKCallback: dense latent weights, of which the layers compute with exactly as many as were asked for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import Granularity, LatentCallback, LatentWeight
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import budgets, select
from lightning_sparse.rules.budgets import Distribution, Scope, budget, floors, layer_counts, shrunk
from lightning_sparse.trainer.callback import refuse_other_sparsity

__all__ = ["TopKCallback"]


class TopKCallback(LatentCallback):
    """Latent weights ``W``; the layers compute with ``P = W * 1_A``, A the positions of the largest scores.

    The sets are found when a fit begins and again after every ``update_every``-th update, among the weights of one
    optimizer. Their sizes are whole numbers, met exactly; among equal scores the earlier position wins.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        scope: the largest of each ``"layer"``, or of all together (``"global"``).
        update_every: number of optimizer steps from one choice of the sets to the next.
        distribution: under ``scope="layer"``, how the active weights are divided among layers; see ``MaskedCallback``.
        min_layer_density: no layer falls below this density.
        include: see ``SparseCallback``.
        exclude: see ``SparseCallback``.
        log_every_n_steps: see ``SparseCallback``.
    """

    threshold_names: Sequence[str] = ()
    granularity: Granularity = "layer"  #: of the thresholds, if the method has any

    def __init__(
        self,
        sparsity: float,
        scope: Scope,
        update_every: int,
        distribution: Distribution | Mapping[str, float] = "uniform",
        min_layer_density: float = 0.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(0.0, type(self).granularity, include, exclude, log_every_n_steps)
        checks.one_of(get_args(Scope), scope=scope)
        checks.integer(1, "1 chooses anew at every step.", update_every=update_every)
        budgets.check(sparsity, distribution, min_layer_density)
        self.sparsity_target = sparsity
        self.scope = scope
        self.update_every = update_every
        self.distribution = distribution
        self.min_layer_density = min_layer_density
        self._updates: dict[str, int] = {}
        self._stepping = False

    # ------------------------------------------------------------------ what a method defines

    def scores(self, weight: LatentWeight) -> Tensor:
        """Return what the largest of are active, of the weight's shape; no NaN."""
        # a weight that is not a number any more ranks first: it must stay in sight
        return weight.latent.abs().nan_to_num_(nan=math.inf, posinf=math.inf)

    def active(self, weights: Sequence[LatentWeight], updates: int) -> int:
        """Return how many of the weights of one optimizer are active after so many updates."""
        return self.final(weights)

    def final(self, weights: Sequence[LatentWeight]) -> int:
        """Return how many of the weights of one optimizer the asked sparsity leaves."""
        return budget(self.sparsity_target, sum(weight.size for weight in weights))

    def is_due(self, updates: int) -> bool:
        """Tell whether the sets are found anew after so many updates."""
        return updates % self.update_every == 0

    def choose(self, weights: Sequence[LatentWeight]) -> None:
        """Write the sets of the weights of one optimizer into their buffers."""
        for weight, count in zip(weights, self.counts(weights), strict=True):
            self.mark(weight, "A", count)

    # ------------------------------------------------------------------ what users read

    @property
    def levels(self) -> dict[str, Tensor]:
        """Nothing: weights are chosen by rank."""
        return {}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The set A of each weight: a boolean tensor of the weight's shape, by parameter name."""
        return {name: weight.buffers["A"] for name, weight in self._weights.items()}

    def mask(self, name: str) -> Tensor:
        """Return the set A of one weight."""
        return self._weights[name].buffers["A"]

    # ------------------------------------------------------------------ how many, and which

    def counts(self, weights: Sequence[LatentWeight]) -> list[int]:
        """Return the size of A in each weight."""
        sizes = [weight.size for weight in weights]
        total = self.active(weights, self._clock(weights))
        if self.scope == "layer":
            shapes = {weight.name: tuple(weight.latent.shape) for weight in weights}
            final = layer_counts(self.distribution, shapes, self.final(weights), self.min_layer_density)
            return shrunk(sizes, list(final.values()), total)
        return self.largest(weights, total, floors(self.min_layer_density, sizes, total))

    def check(self, weights: Sequence[LatentWeight]) -> None:
        """Raise ValueError if the counts at the end of a schedule cannot be met by the weights of one optimizer."""
        if self.scope == "layer":
            shapes = {weight.name: tuple(weight.latent.shape) for weight in weights}
            layer_counts(self.distribution, shapes, self.final(weights), self.min_layer_density)
        else:
            floors(self.min_layer_density, [weight.size for weight in weights], self.final(weights))

    def largest(self, weights: Sequence[LatentWeight], total: int, floors: Sequence[int]) -> list[int]:
        """Return how many of the ``total`` largest scores of all lie in each weight, ``floors`` of them in any case."""
        everywhere = [torch.ones_like(weight.latent, dtype=torch.bool) for weight in weights]
        return select.count_global_top_k(map(self.scores, weights), total, everywhere, floors)

    def mark(self, weight: LatentWeight, key: str, count: int) -> None:
        """Write the set of the ``count`` largest scores, in the weight's order of memory."""
        weight.buffers[key] = torch.empty_like(weight.latent, dtype=torch.bool).copy_(
            select.top_k(self.scores(weight), count)
        )

    def _clock(self, weights: Sequence[LatentWeight]) -> int:
        """Return the number of updates of the weights of one optimizer: newcomers go by the others' clock."""
        return max((self._updates.get(weight.name, 0) for weight in weights), default=0)

    # ------------------------------------------------------------------ verbs

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """All weights are active until the sets are chosen."""
        return {"A": torch.ones_like(latent, dtype=torch.bool)}

    def begin(self, weight: LatentWeight) -> None:
        """See a weight whose latent values are still the parameter's."""

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        held = list(self._weights.values())
        super().attach(choices, optimizers, resumed)
        fresh = [weight for weight in self._weights.values() if weight not in held]
        if not resumed:
            self._updates = {}
        for optimizer in optimizers:
            self._begin([weight for weight in self._owned(optimizer) if weight in fresh])

    @torch.no_grad()
    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        clock = self._clock(self._owned(optimizer))
        super().attach_more(choices, optimizer)
        new = [self._weights[choice.name] for choice in choices]
        self._updates |= {weight.name: clock for weight in new}
        self._begin(new)

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        self._stepping = share > 0
        super().before_step(optimizer, share, scale)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``W * 1_A``."""
        out.copy_(W)
        select.zero_outside_(out, weight.matrix(weight.buffers["A"]))

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """Count the update, and find the sets anew if it is time."""
        if optimizer is None or not self._stepping or _skipped(optimizer):
            return
        owned = self._owned(optimizer)
        updates = self._clock(owned) + 1
        self._updates |= {weight.name: updates for weight in owned}
        if owned and self.is_due(updates):
            self.choose(owned)
            for weight in owned:
                if weight not in weights:  # one without a gradient, which nobody else projects
                    self._project(weight)

    def _begin(self, weights: Sequence[LatentWeight]) -> None:
        if not weights:
            return
        for weight in weights:
            self.begin(weight)
        self.choose(weights)
        for weight in weights:
            self._project(weight)

    def _owned(self, optimizer: Optimizer) -> list[LatentWeight]:
        return [weight for pool in self._pools.get(id(optimizer), ()) for weight in pool.weights]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return latents, sets and clock."""
        return {
            **super().state_dict(),
            "sparsity": self.sparsity_target,
            "updates": dict(self._updates),
            "begun": dict(self._begun),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        refuse_other_sparsity(self, state_dict["sparsity"], self.sparsity_target)
        self._updates = dict(state_dict["updates"])
        super().load_state_dict(state_dict)


def _skipped(optimizer: Optimizer) -> bool:
    """Tell whether a fused optimizer under AMP has found its gradients infinite and made no update."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
