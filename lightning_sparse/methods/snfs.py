"""SNFS: sparse networks from scratch by sparse momentum (Dettmers & Zettlemoyer, 2019).

Algorithm 1. Decisions: the momentum is an exponential average of the dense gradient that the method keeps by itself, so
any optimizer will do, and new connections may grow wherever it is large; under Adam, too, it is this average, not the
optimizer's ratio of moments; a layer that gets more than it has room for passes the rest on to the others in
proportion; connections that were just dropped are not grown again.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.masked import DenseOnly
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.families.shares import capped_where_nearly_dense, droppable, shared_out
from lightning_sparse.rules.budgets import portion
from lightning_sparse.weights import gradient_averages
from lightning_sparse.weights.base import Weight

__all__ = ["SNFS"]


class SNFS(DenseOnly, PruneAndGrow):
    """Sparse Momentum: layers whose connections have the larger momentum on average get more of them.

    It keeps a dense average of gradients beside each weight and needs dense weight gradients at every step.

    Example:
        >>> from lightning_sparse import SNFS
        >>> callback = SNFS(sparsity=0.9)

    Reference:
        "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019.
    """

    drop_fraction: float = 0.5
    smoothing: float = option(
        default=0.9,
        check=partial(checks.fraction, "The paper's value is 0.9.", below_1=True),
        doc="share of its past that the average keeps at each step, in [0, 1).",
    )
    stop_at: float = 1.0

    paper_update_every = None

    needs_whole_gradients = True
    unfit_patterns = dict.fromkeys(("N:M",), "layers exchange connections, and full groups take none. Use RigL or SET.")

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Begin the average at 0."""
        return {"momentum": gradient_averages.start(weight)}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """Average the gradients of all steps but those that AMP skips."""
        gradient_averages.update_(weights, "momentum", self.smoothing, scale)

    def claims(self, weights: Sequence[Weight]) -> list[float]:
        """Return the layers' claims to connections: their mean momentum."""
        return [gradient_averages.mean_of_connections(weight, "momentum") for weight in weights]

    def drop_counts(self, weights: Sequence[Weight], fraction: float) -> list[int]:
        """Drop the same share of each layer, but of a nearly dense one that claims more than an even share less.

        It drops no more than its own share of zeros: what a layer with the largest claims drops, it can grow again.
        """
        wanted = [portion(fraction, weight.num_active) for weight in weights]
        capped = capped_where_nearly_dense(weights, wanted, self.claims(weights))
        return droppable(weights, capped, self.min_layer_density)

    def grow_counts(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Share out what was dropped by the layers' claims."""
        return shared_out(weights, drops, self.claims(weights), self.min_layer_density)

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow where ``|momentum|`` is largest."""
        return gradient_averages.largest_inactive(weight, "momentum", n)
