"""GGR: global gradient-based redistribution (Parger et al., ICML 2022).

Section 3. Decisions: connections that were just dropped are not candidates for growth; the odd one of a layer's number
goes by gradient; the step that moves connections applies its update, too.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.families.shares import droppable, needed
from lightning_sparse.rules import ascending, ties
from lightning_sparse.rules.budgets import portion
from lightning_sparse.rules.parts import together
from lightning_sparse.weights.base import Weight

__all__ = ["GGR"]


class GGR(PruneAndGrow):
    """Global Gradient-based Redistribution: a ranking of all gradients decides which layers get new connections.

    With ``storage="sparse"`` an update computes the gradient of some rows at a time.

    Example:
        >>> from lightning_sparse import GGR
        >>> callback = GGR(sparsity=0.97, distribution="uniform")

    Reference:
        "Gradient-based Weight Density Balancing for Robust Dynamic Sparse Training", ICML 2022.
    """

    drop_fraction: float = option(
        default=0.1, doc="the paper's rho, share of a layer's connections that the first update drops, in (0, 1]."
    )
    random_share: float = option(
        default=0.5,
        check=partial(checks.fraction, "The paper's value is 0.5."),
        doc="share of a layer's new connections that are drawn at random; the others are those of largest gradient. 0 "
        "and 1 are the paper's ablations GGR-RigL and GGR-SET.",
    )
    stop_at: float = 0.5

    paper_update_every = None
    resizes = True
    unfit_patterns: ClassVar[Mapping[str, str]] = {
        "N:M": "its layers compete for connections before they drop any, so it cannot know which groups have room. Use "
        "RigL or SET."
    }
    dense_gradient_to_move = True
    new_value = 1e-10  # Sec. 3.3: active, though tiny

    def __post_init__(self) -> None:
        super().__post_init__()
        self._won: dict[str, tuple[Tensor, Tensor]] = {}  # positions and gradients, by layer, within an update

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of each layer; let the layers compete for as many in a ranking of all gradients."""
        wanted = [portion(fraction, weight.num_active) for weight in weights]
        drops = droppable(weights, wanted, self.min_layer_density)
        ranked = together(weights).ranking(weights, sum(drops), needed(weights, drops, self.min_layer_density))
        self._won = dict(zip((weight.name for weight in weights), ranked, strict=True))
        self.rewire(weights, drops, scale)

    def grow_counts(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Give each layer as many as it has won."""
        return together(weights).total(*(len(self._won[weight.name][0]) for weight in weights))

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow some of those that have won, by gradient, and draw the others at random."""
        won, gradients = self._won.pop(weight.name)
        at_random = portion(self.random_share, n)
        grown = won[weight.part.top_k_positions(gradients, n - at_random, order=ties.at(won, weight.shape))]
        taken = ascending.merged(weight.active_indices.cpu(), grown)
        return ascending.merged(grown, weight.part.free_positions(at_random, taken, weight.size, self.generator))
