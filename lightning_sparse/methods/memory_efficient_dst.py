"""GSE: guided stochastic exploration (Heddes, Srinivasa, Givargis and Nicolau, arXiv 2401.06898).

The defaults are those of its first version, "Memory Efficient Dynamic Sparse Training": Section 3, Eqs. 1-7, and
Appendix C; ``subset="active"``, GraEst and the Erdős-Rényi start are of the published one's program. Decisions:
connections dropped in an update belong to those that were active, so they are not sampled; the step that moves
connections goes on, and the new ones, which start at 0, take their first step with the gradient they were chosen by.
With masks that is the dense one, which is there anyway, averaged over processes; with ``storage="sparse"`` it is
computed for the sampled positions alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.families.shares import least
from lightning_sparse.families.subsets import Heuristic, Subset, Subsets, largest, subset_counts
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules.budgets import Distribution, portion
from lightning_sparse.rules.parts import together
from lightning_sparse.rules.patterns import first_of_rows
from lightning_sparse.weights.base import Weight

__all__ = ["GSE", "MemoryEfficientDST"]


class MemoryEfficientDST(PruneAndGrow):
    """Guided Stochastic Exploration: drop the smallest weights of all, grow the largest gradients of a sampled subset.

    An update drops ``|P|`` connections of smallest ``|W|``, whatever their layer. In each layer it samples inactive
    connections ``(a, b)``, input ``a ~ f`` and output ``b ~ g``; of these it grows the ``|P|`` of largest ``|dP|``. At
    the start of a fit the weights of each neuron are multiplied by the square root of its dense fan-in over its actual
    one.

    Example:
        >>> from lightning_sparse import MemoryEfficientDST
        >>> callback = MemoryEfficientDST(sparsity=0.98, heuristic="grabo", subset_multiplier=10)

        As in the authors' program, under the name of the published paper:

        >>> from lightning_sparse import GSE
        >>> callback = GSE(sparsity=0.98, heuristic="graest", subset="active", distribution="er")

    Reference:
        "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration", arXiv 2401.06898; first
        submitted as "Memory Efficient Dynamic Sparse Training".
    """

    heuristic: Heuristic = option(
        default="grabo",
        doc='what ``f`` and ``g`` are: ``"random"``: uniform; ``"grabo"``: in proportion to ``sum |h|`` over the '
        'inputs and ``sum |delta|`` over the gradients of the outputs; ``"graest"``: to ``|sum r h|`` and '
        "``|sum r delta|``, with a random sign r for each sample, so that their product is the gradient on average; "
        '``"synflow"``: the flow of ones through ``|W|``, from the input to ``a`` and from ``b`` to the output.',
    )
    subset: Subset = option(
        default="size",
        doc='how many connections a layer samples: ``"size"``: in proportion to its size, ``subset_multiplier |P|`` in '
        'all; ``"active"``: ``subset_multiplier`` for each active one, and all that are inactive in a layer that is '
        "half dense or more.",
    )
    subset_multiplier: float | None = option(
        default=None,
        check=partial(checks.above, 0, "Leave it out for the papers' value."),
        doc='above 0, with ``subset="size"`` at least 1; by default the papers\' values: 10, or 1 with "active".',
    )
    drop_fraction: float = option(
        default=0.2, doc="share of the connections that the first update would drop, in (0, 1]."
    )
    stop_at: float = 0.6
    distribution: Distribution | Mapping[str, float] = "uniform"

    paper_update_every = 1000
    resizes = True
    unfit_patterns = dict.fromkeys(
        ("N:M", "block", "row"), "it samples pairs of an input and an output, single connections. Use RigL or SET."
    )

    def __post_init__(self) -> None:
        """Check that there is something to choose from."""
        super().__post_init__()
        if self.subset == "size" and self.multiplier < 1:
            raise ValueError(
                f'subset_multiplier must be at least 1 with subset="size", got {self.subset_multiplier!r}: it is the '
                "number of connections sampled for each one that moves. With 1 all sampled connections are grown."
            )
        self._subsets = Subsets(self)
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}  # what goes and what comes, by layer, within an update

    @property
    def needs_whole_weights(self) -> str | None:
        """The flow through the network is computed with whole weights."""
        if self.heuristic == "synflow":
            return 'Use heuristic="grabo", "graest" or "random", or strategy="ddp".'
        return super().needs_whole_weights

    @property
    def multiplier(self) -> float:
        """The ``subset_multiplier`` that was given, or the papers' value."""
        return (10 if self.subset == "size" else 1) if self.subset_multiplier is None else self.subset_multiplier

    def update(self, weights: Sequence[Weight], fraction: float, scale: float) -> None:
        """Drop the smallest ``|W|`` of all layers and grow the largest ``|dP|`` of all their subsets."""
        kept = [min(least(weight, self.min_layer_density), weight.num_active) for weight in weights]
        active, room = sum(weight.num_active for weight in weights), sum(weight.num_inactive for weight in weights)
        n = min(portion(fraction, active), active - sum(kept), room)  # |P|
        counts = self.subset_counts(weights, n)
        n = min(n, sum(counts))
        for weight in weights:
            weight.hold_indices()
        magnitudes = [first_of_rows(weight, weight.magnitudes) for weight in weights]
        staying = together(weights).count_global_top_k(magnitudes, active - n, None, kept)
        drops = [weight.num_active - stay for weight, stay in zip(weights, staying, strict=True)]
        each = zip(weights, drops, magnitudes, strict=True)
        dropped = [weight.smallest(fewer, scores) for weight, fewer, scores in each]
        del magnitudes, each
        subsets = self.subsets(weights, counts)
        gradients = [weight.gradient_at(subset).abs() for weight, subset in zip(weights, subsets, strict=True)]
        grown = largest(weights, subsets, gradients, n)
        chosen = zip(dropped, grown, strict=True)
        self._chosen = {weight.name: moves for weight, moves in zip(weights, chosen, strict=True)}
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

    def subset_counts(self, weights: Sequence[Weight], n: int) -> list[int]:
        """Return how many inactive connections each layer samples, for ``n`` that move in all."""
        return subset_counts(weights, n, self.subset, self.multiplier)

    def subsets(self, weights: Sequence[Weight], counts: Sequence[int]) -> list[Tensor]:
        """Draw so many inactive connections of each layer: flat positions, ascending."""
        return self._subsets.draw(weights, counts)

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]:
        """Listen to what the heuristic needs, too."""
        return [*super().watchers(weights), *self._subsets.listeners(weights)]


GSE = MemoryEfficientDST
