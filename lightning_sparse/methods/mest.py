"""MEST: memory-economic sparse training (Yuan et al., NeurIPS 2021).

Section 3: elastic mutation (EM) and the soft memory bound (EM&S). Decisions: the mutated share falls by a cosine unless
``decay="halving"`` lowers it in the two steps of the authors' scripts; the soft bound starts at the budget and returns
to it, exactly, at the end of the updates; the gradient is that of the step's own batch; connections that were just
dropped are not drawn again.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import criteria
from lightning_sparse.rules.budgets import portion
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["MEST"]


class MEST(PruneAndGrow):
    """Memory-Economic Sparse Training: drop the smallest ``|W| + lambda |dP|`` of each layer, grow at random.

    With ``soft_bound`` new connections grow before old ones are dropped: between two updates a layer has up to
    ``drop_fraction`` more connections than its budget, and the next update drops as many, old or new, by importance.
    ``sparsity`` is then reached at the end.

    Example:
        >>> from lightning_sparse import MEST
        >>> callback = MEST(sparsity=0.9, soft_bound=True)

        The authors' schedule on CIFAR, 160 epochs of 782 batches: every 5 epochs 20 % move, from epoch 90 on 10 %, and
        from epoch 120 on none.

        >>> callback = MEST(sparsity=0.9, drop_fraction=0.2, decay="halving", stop_at=0.75, update_every=3910)

    Reference:
        "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021.
    """

    gradient_weight: float = option(
        default=0.5, check=partial(checks.at_least, 0, "0 uses only magnitudes."), doc="lambda, at least 0."
    )
    soft_bound: bool = option(default=False, doc="grow first and drop at the next update (the paper's EM&S).")

    paper_update_every = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resizes = self.soft_bound
        if self.soft_bound and self.pattern.kind == "N:M":
            raise ValueError(
                f"soft_bound must be False with pattern={self.pattern_name!r}, got True: groups that have their N "
                "connections have no room for more between updates. Leave it out."
            )
        self._above: Counter[str] = Counter()  # connections above the budget, by the layers' names

    def drop_scores(self, weight: Weight, scale: float) -> Tensor:
        """``|W| + lambda |dP|`` of the active connections; ``|W|`` where there is no gradient."""
        if weight.parameter is None or weight.parameter.grad is None:
            return criteria.magnitude(weight)
        return criteria.magnitude_and_gradient(weight, self.gradient_weight / scale)

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow at random where nothing was."""
        return self.pattern.grow_at_random(weight, n, dropped, self.generator)

    # ------------------------------------------------------------------ the soft bound

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Update; under the soft bound drop to the budget and grow above it, also weights without gradient."""
        if not self.soft_bound:
            super().move(weights, group, scale)
            return
        for weight in self.units(group.weights):
            more = self.extra(weight, group)
            dropped = self.drop(weight, self._above[weight.name], scale)
            weight.rewire(dropped, self.grow(weight, more, dropped))
            self._above[weight.name] = more

    @property
    def surplus(self) -> int:
        """Number of connections above the budget now."""
        return sum(self._above[name] for name in self._weights)

    def extra(self, weight: Weight, group: WeightGroup) -> int:
        """Return how many connections above its budget a layer has from now on; half of the free places at most."""
        if group.step >= self.last_step():
            return 0
        return min(portion(self.fraction(group), self.budget(weight)), (weight.size - self.budget(weight)) // 2)

    def budget(self, weight: Weight) -> int:
        """Return the number of a layer's connections, without those above it."""
        return weight.num_active - self._above[weight.name]

    def target_count(self, group: WeightGroup) -> int | None:
        """Return the budget and what is above it now."""
        if not self.soft_bound:
            return None
        return sum(self.budget(weight) + self.extra(weight, group) for weight in self.units(group.weights))

    def last_step(self) -> int:
        """Return the step at which the soft bound ends."""
        return min(math.ceil(self.stop_at * self.total_steps), int(self.total_steps) - 1)

    def is_due(self, group: WeightGroup) -> bool:
        """Update a last time where the soft bound ends, or as soon as that lies behind in a training made shorter."""
        above = self.soft_bound and any(self._above[weight.name] for weight in group.weights)
        return super().is_due(group) or (above and group.step >= self.last_step())

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin with the budget."""
        super().initial_masks(weights)
        for weight in weights:
            self._above[weight.name] = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before the soft bound did."""
        super().on_train_end(trainer, pl_module)
        if self.surplus and not any(group.halted_by for group in self._groups):  # of which it has been told
            self.warn_once(
                f"{self!r} has {self.surplus} active weights above its budget: the training ended before "
                f"{self.stop_at:.0%} of the steps planned. Set max_epochs or max_steps to what is really trained."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what is above the budgets, too."""
        return {**super().state_dict(), "above": dict(self._above)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._above = Counter(state_dict["above"])
