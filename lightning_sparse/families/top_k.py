"""TopKCallback: dense latent weights, of which the layers compute with exactly as many as were asked for."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families import common, starts
from lightning_sparse.families.latent import LatentCallback, LatentGroup, LatentWeight
from lightning_sparse.families.shares import floors, layer_counts
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, Scope, budget, shrunk
from lightning_sparse.rules.parts import together
from lightning_sparse.trainer.agreement import refuse_broken_clock
from lightning_sparse.trainer.guards import refuse_other_sparsity, warn_of_equal_scores
from lightning_sparse.trainer.updates import skips
from lightning_sparse.weights.latent_group import update_counts

__all__ = ["TopKCallback"]


class TopKCallback(LatentCallback):
    """Latent weights ``W``; the layers compute with ``P = W * 1_A``, A the positions of the largest scores.

    The sets are found when a fit begins and again after every ``update_every``-th update, among the weights of one
    optimizer. Their sizes are whole numbers, met exactly.
    """

    sparsity_target: float = option(alias="sparsity", kw_only=False, check=common.check_sparsity, doc=common.SPARSITY)
    scope: Scope = option(default="layer", doc=common.SCOPE)
    update_every: int = option(
        default=1,
        check=partial(checks.integer, 1, "1 chooses anew at every step."),
        doc="number of optimizer steps from one choice of the sets to the next.",
    )
    distribution: Distribution | Mapping[str, float] = option(
        default="uniform",
        check=common.check_distribution,
        doc=f'under ``scope="layer"``, {common.DISTRIBUTION}',
    )
    min_layer_density: float = option(default=0.0, check=common.check_min_layer_density, doc=common.MIN_LAYER_DENSITY)
    scale_init: bool = option(
        default=True,
        doc=f"{common.SCALE_INIT} Each layer's are multiplied by the square root of its size over the size of A.",
    )

    def __post_init__(self) -> None:
        """Begin without sets."""
        super().__post_init__()
        self._stepping = False

    # ------------------------------------------------------------------ what a method defines

    def scores(self, weight: LatentWeight) -> Tensor:
        """Return what the largest of are active, of the weight's shape."""
        return weight.latent.abs()

    def active(self, weights: Sequence[LatentWeight], updates: int) -> int:
        """Return how many of the weights of one optimizer are active after so many updates."""
        return self.final(weights)

    def final(self, weights: Sequence[LatentWeight]) -> int:
        """Return how many of the weights of one optimizer the asked sparsity leaves."""
        return budget(self.sparsity_target, sum(weight.size for weight in weights))

    def is_due(self, group: LatentGroup) -> bool:
        """Tell whether the sets of the weights of one optimizer are found anew after its latest update."""
        return group.updates % self.update_every == 0

    def stepped(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """See ``weights``, those of ``optimizer`` that its update has moved, before their sets are found anew."""

    def choose(self, weights: Sequence[LatentWeight], updates: int) -> None:
        """Write the sets of the weights of one optimizer, after so many updates, into their buffers."""
        for weight, count in zip(weights, self.counts(weights, updates), strict=True):
            self.mark(weight, "A", count)

    # ------------------------------------------------------------------ what users read

    def nonzero(self, weight: LatentWeight) -> Tensor:
        """Return the set A of one weight."""
        return weight.buffers["A"]

    # ------------------------------------------------------------------ how many, and which

    def counts(self, weights: Sequence[LatentWeight], updates: int) -> list[int]:
        """Return the size of A in each weight."""
        sizes = [weight.size for weight in weights]
        total = self.active(weights, updates)
        if self.scope == "layer":
            return shrunk(sizes, self.final_counts(weights), total)
        return self.largest(weights, total, floors(weights, self.min_layer_density, total))

    def final_counts(self, weights: Sequence[LatentWeight]) -> list[int]:
        """Return how many of each weight the asked sparsity leaves at least.

        Raises:
            ValueError: the distribution, or the least density of a layer, cannot be met.
        """
        if self.scope == "layer":
            counts = layer_counts(weights, self.distribution, self.final(weights), self.min_layer_density)
            return list(counts.values())
        return floors(weights, self.min_layer_density, self.final(weights))

    def largest(self, weights: Sequence[LatentWeight], total: int, floors: Sequence[int]) -> list[int]:
        """Return how many of the ``total`` largest scores of all lie in each weight, ``floors`` of them in any case."""
        everywhere = [torch.ones_like(weight.latent, dtype=torch.bool) for weight in weights]
        scores = [self.scores(weight) for weight in weights]
        return together(weights).count_global_top_k(scores, total, everywhere, floors)

    def mark(self, weight: LatentWeight, key: str, count: int) -> None:
        """Write the set of the ``count`` largest scores, in the weight's order of memory."""
        mask = torch.empty_like(weight.latent, dtype=torch.bool)
        scores = select.first_of_rows(self.scores(weight), weight.nonempty)
        weight.buffers[key] = mask.copy_(weight.part.top_k(scores, count))

    # ------------------------------------------------------------------ a fit begins

    @property
    def planned_density(self) -> dict[str, float]:
        """The density that each layer begins with."""
        return self.layer_density

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """All weights are active until the sets are chosen."""
        return {"A": torch.ones_like(latent, dtype=torch.bool)}

    def begin(self, weight: LatentWeight) -> None:
        """See a weight whose latent values are still the parameter's."""

    def scale(self, weight: LatentWeight, factor: float) -> None:
        """Multiply ``P`` by a factor, through the latent values."""
        weight.latent.mul_(factor)

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        updates, held = update_counts(self._groups.values()), list(self._weights.values())
        super().attach(choices, optimizers, resumed)
        for group in self._groups.values():
            if resumed:
                group.go_on(updates)
            self._begin([weight for weight in group.weights if weight not in held], group)

    @torch.no_grad()
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        super().attach_added(choices, optimizer)
        self._begin([self._weights[choice.name] for choice in choices], self._groups[id(optimizer)])

    def _begin(self, weights: Sequence[LatentWeight], group: LatentGroup) -> None:
        """Choose the sets of new weights among themselves, by the clock of their group."""
        if not weights:
            return
        scaled = starts.made_anew(self, self._fit.module, weights, [weight.latent for weight in weights])
        for weight in weights:
            self.begin(weight)
        self.choose(weights, group.updates)
        active = self.ones({weight.name: weight.buffers["A"] for weight in weights})
        chosen = [weight for weight in weights if active[weight.name] < weight.size]
        warn_of_equal_scores(self, [weight.name for weight in chosen if weight.part.all_equal(self.scores(weight))])
        for weight in weights:
            if weight.name in scaled:
                self.scale(weight, math.sqrt(weight.size / max(1, active[weight.name])))
        self._projection.project(weights)

    # ------------------------------------------------------------------ steps

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        self._stepping = share > 0
        super().before_step(optimizer, share, scale)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``W * 1_A``."""
        out.copy_(W)
        select.zero_outside_(out, weight.matrix(weight.buffers["A"]))

    def written(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Find the sets anew, which may be others now."""
        group = self._groups[id(optimizer)]
        self.choose(group.weights, group.updates)
        self._projection.project(group.weights)

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """Count the update, and find the sets anew if it is time."""
        if optimizer is None or not self._stepping or skips(optimizer):
            return
        self.stepped(optimizer, weights)
        group = self._groups[id(optimizer)]
        group.updates += 1
        if group.weights and self.is_due(group):
            self.choose(group.weights, group.updates)
            others = [weight for weight in group.weights if weight not in weights]
            self._projection.project(others)  # nobody else does

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return latents, sets and clock."""
        return {
            **super().state_dict(),
            "sparsity": self.sparsity_target,
            "updates": update_counts(self._groups.values()),
            "begun": dict(self._before_fit),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        refuse_other_sparsity(self, state_dict["sparsity"], self.sparsity_target)
        super().load_state_dict(state_dict)
        refuse_broken_clock(self, state_dict["updates"], state_dict["updates"].keys())
        if self._fit.module is None:  # a clock for each weight until a fit tells which have an optimizer together
            self._groups.clear()
            for index, weight in enumerate(self._weights.values()):
                self._groups[index].weights = [weight]
        for group in self._groups.values():
            group.go_on(state_dict["updates"])
