"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., NeurIPS 2021).

Algorithm 1 of the paper, with the authors' program for what it leaves open. Decisions: connections that were pruned or
dropped in an update are not grown in it, so a layer regenerates no more of them than it had free places; new ones start
at 0; the gradient is that of the step's own batch, and the optimizer's update is applied as in any step.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.gradual import GradualPruning
from lightning_sparse.rules import criteria, ties
from lightning_sparse.rules.budgets import portion
from lightning_sparse.rules.clock import Clock
from lightning_sparse.rules.schedules import cosine
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["GraNet"]


class GraNet(GradualPruning):
    """Gradual pruning with regrowth: prune by global magnitude; each update also moves connections within layers.

    Regeneration continues after the schedule's end. ``scope="layer", distribution="uniform"`` is the authors'
    GraNet_uniform: every layer reaches the same sparsity.

    Example:
        >>> from lightning_sparse import GraNet
        >>> callback = GraNet(sparsity=0.9, initial_sparsity=0.5)

    Reference:
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021.
    """

    initial_sparsity: float = 0.5
    drop_fraction: float = option(
        default=0.5,
        check=partial(
            checks.fraction,
            "The paper's value is 0.5; the method without regeneration is GMP.",
            above_0=True,
        ),
        doc="the paper's r, share of a layer's connections that the first update regenerates, in (0, 1]; it falls to 0 "
        "by a cosine until the end of the training.",
    )
    end_at: float = 0.5

    paper_update_every = 1000
    dense_gradient_to_move = True
    unfit_patterns: ClassVar[Mapping[str, str]] = {
        "N:M": "it regenerates connections while groups still have more than N, and N:M says nothing of these. Use GMP "
        "or RigL."
    }

    @property
    def clock(self) -> Clock:
        """Regenerate also after the schedule's end."""
        first, last = self.span()
        return Clock(self.every, begin=first, end=math.inf, closing=last)

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Prune to the schedule; then drop the smallest ``|W|`` of each layer and grow the largest ``|dP|``."""
        trained = group.step > 0  # what has not been trained is not judged
        fraction = self.drop_fraction * cosine(group.step / self.total_steps) if trained else 0.0
        rooms = [min(portion(fraction, weight.num_active), weight.num_inactive) for weight in weights]
        free = [weight.largest_gradients(room) for weight, room in zip(weights, rooms, strict=True)]
        self.prune(group)
        for weight, room, (found, gradients) in zip(weights, rooms, free, strict=True):  # what was pruned stays away
            n = min(portion(fraction, weight.num_active), room, self.pattern.num_movable(weight))
            dropped = self.pattern.drop(weight, criteria.magnitude(weight), n)
            best = weight.part.top_k_positions(gradients, n, order=ties.at(found, weight.shape))
            weight.rewire(dropped, found[best])
