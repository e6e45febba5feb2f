"""SRigL: RigL with a constant fan-in and neuron ablation (Lasby et al., ICLR 2024).

All neurons of a layer have the same number ``k`` of connections, or none. An update of a layer with ``n`` connections
to spend, with RigL's share ``alpha`` of them that falls by a cosine (Sec. 3):

1. D are the K smallest ``|W|``, K = alpha times the number of connections, and G the K largest ``|dP|`` of connections
   that are not there. A connection is *salient* if it is in G, or active and not in D.
2. Neurons with fewer than ``gamma_sal k`` salient connections are ablated: they lose all of their connections.
3. The fan-in becomes ``k' = n / m``, where ``m`` is the number of neurons that are left.
4. D is dropped.
5. Each neuron grows its largest ``|dP|`` until it has ``k'`` connections.

The equations are written from memory of the paper and of its program, whose texts were not at hand. Decisions: ``n`` is
what the layer began with, and ``k'`` is rounded to the nearest whole number, so rounding errors do not add up; a neuron
without connections stays so, and only connections of the others are in G; what was just dropped is not grown again, so
a neuron keeps some of D if it has too few others; if fewer neurons could not hold ``n`` connections, those with the
most salient ones stay; the fan-ins that a fit begins with are the shares of the distribution, rounded so that their sum
is near the budget; neurons that are divided by their norms are not ablated. As in RigL, new connections start at 0, and
the step that moves connections applies no optimizer update.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import rank_zero_info
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.fan_in_budgets import FanInBudgets
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules.budgets import budget
from lightning_sparse.rules.fan_in import FanIn
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["SRigL"]


class SRigL(PruneAndGrow):
    """Structured RigL: the same number of connections for every neuron of a layer, and neuron ablation.

    Neurons with few salient connections lose all of theirs.

    Example:
        >>> from lightning_sparse import SRigL
        >>> callback = SRigL(sparsity=0.9)
        >>> callback = SRigL(sparsity=0.9, min_salient=0.95)  # of a transformer

    Reference:
        "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.
    """

    min_salient: float = option(
        default=0.3,
        check=partial(checks.fraction, "0.3 is usual for convolutions, 0.95 for transformers; 0 ablates no neuron."),
        doc="the paper's gamma_sal: a neuron is ablated if fewer than this share of its connections are salient, "
        "in [0, 1]; 0: none is.",
    )
    drop_fraction: float = option(
        default=0.3,
        doc="the paper's alpha, share of a layer's connections that the first update drops, in (0, 1].",
    )
    pattern_name: str = fixed(default="fan-in")

    must_stay: ClassVar[Sequence[str]] = ()
    skips_update = True
    dense_gradient_to_move = True
    pattern = FanIn()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resizes = self.min_salient > 0
        self._budgets = FanInBudgets(self.pattern, self.min_layer_density, self._groups)

    # ------------------------------------------------------------------ an update

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Return the largest ``|dP|`` of neurons that have connections: G."""
        return self.pattern.largest_gradients(weight, n)

    def rewire(self, weights: Sequence[Weight], drops: Sequence[int], scale: float) -> None:
        """Ablate neurons of each layer, drop K connections, and give the other neurons their new fan-in."""
        for weight, K in zip(weights, drops, strict=True):
            if not K:
                continue
            weight.hold_indices()
            D = self.drop(weight, K, scale)
            G = self.grow(weight, K, D)
            active, lost, won = (self.pattern.fan_ins(weight, each) for each in (weight.active_indices, D, G))
            ablated = self._budgets.ablated(weight, active, active - lost + won, self.min_salient)
            stays = (active > 0) & ~ablated
            fan_ins = stays * self._budgets.fan_in(weight, int(stays.sum()))
            dropped = self.pattern.trimmed(weight, D, fan_ins)
            weight.rewire(dropped, self.pattern.grow_to(weight, dropped, fan_ins), self.new_value)

    def target_count(self, group: WeightGroup) -> int:
        """Return how many connections neurons with whole fan-ins have."""
        return self._budgets.target_count(group)

    # ------------------------------------------------------------------ numbers

    @property
    def surplus(self) -> int:
        """Connections above the budget, which whole fan-ins cannot meet."""
        if self.sparsity_target is None:
            return 0
        return self._budgets.surplus(self._weights.values(), budget(self.sparsity_target, self.size))

    @property
    def ablated(self) -> dict[str, int]:
        """Number of neurons of each layer that have no connections, by parameter name."""
        fan_ins = {name: self._budgets.fan_ins(weight) for name, weight in self._weights.items()}
        return {name: int((each == 0).sum()) for name, each in fan_ins.items()}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """The number of ablated neurons is logged, too."""
        return {"sparsity/ablated": sum(self.ablated.values())}

    # ------------------------------------------------------------------ a fit

    @property
    def needs_whole_weights(self) -> str | None:
        """Fan-ins are those of all rows."""
        return "Use RigL, or strategy='ddp'."

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the weights over, and tell their fan-ins."""
        super().on_fit_start(trainer, pl_module)
        self.refuse_number([*self._weights.values()])
        largest = {name: int(self._budgets.fan_ins(weight).max()) for name, weight in self._weights.items()}
        fan_ins = ", ".join(f"{k} in {name}" for name, k in largest.items())
        active = sum(self.layer_count.values())
        rank_zero_info(
            f"{self!r} has {active} connections for a budget of {active - self.surplus}. A neuron has {fan_ins}."
        )
