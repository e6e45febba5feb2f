"""ACDC: alternating compressed and decompressed training (Peste, Iofinova, Vladu & Alistarh, NeurIPS 2021).

Algorithm 1, with the practical choices of Section 3.2. With the top-k operator ``T_k``, which keeps the ``k`` weights
of largest magnitude, a compressed phase begins with ``theta <- T_k(theta)`` and trains on that support; a decompressed
phase trains all weights, the pruned ones from 0 on, and begins with the optimizer's momentum at 0. Decisions: phases
are shares of the training; "momentum" is all that an optimizer keeps for each element, but scales such as Adam's second
moments, which pruned weights get anew as grown connections do; the dense network is the one that the last pruning
finds, and it is not trained further.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import rank_zero_info
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families import magnitude
from lightning_sparse.families.alternation import Alternation
from lightning_sparse.families.common import FINAL_SPARSITY, PRUNING_SCOPE
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.shares import floors
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, Scope, budget
from lightning_sparse.rules.phases import PAPER_CYCLES
from lightning_sparse.trainer.fit import epochs
from lightning_sparse.trainer.guards import REMEDY, listed, refuse_unknown_length
from lightning_sparse.trainer.twin import DenseTwin
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.fresh import reset_momentum
from lightning_sparse.weights.group import WeightGroup

__all__ = ["ACDC"]


def _check_cycles(cycles: int | Literal["auto"]) -> None:
    """Raise unless it is a number of phases or "auto"."""
    if cycles != "auto":
        checks.integer(1, "'auto' takes the paper's number, or fewer in a short training.", cycles=cycles)


class ACDC(DenseOnly, MaskedCallback):
    """Alternating Compressed/DeCompressed training: dense and sparse phases in turn; ends with a network of each kind.

    A dense warm-up comes first. Then phases of equal length are sparse and dense in turn, the first and the last of
    them sparse. A longer dense phase and a longer sparse one end the training. Each sparse phase keeps the weights of
    largest magnitude, and trains them. A dense phase trains all weights, and those that were pruned start at 0.

    Example:
        >>> from lightning_sparse import ACDC
        >>> callback = ACDC(sparsity=0.9)

        After the fit, ``module.load_state_dict(callback.dense_state_dict())`` gives the dense network.

    Reference:
        "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", NeurIPS 2021.
    """

    takes_tensor_parallel = False

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=FINAL_SPARSITY)
    initial: str = fixed(default="random")  # it begins dense
    scale_init: bool = fixed(default=False)
    begin_at: float = option(
        default=0.1,
        check=partial(checks.fraction, "The paper's value is 0.1."),
        doc="share of the training after which the dense warm-up ends, from 0 on.",
    )
    last_dense: float = option(
        default=0.1,
        check=partial(checks.fraction, "The paper's value is 0.1.", above_0=True),
        doc="share of the training that the last dense phase takes, above 0.",
    )
    end_at: float = option(
        default=0.85,
        check=partial(checks.fraction, "The paper's value is 0.85."),
        doc="share of the training after which the last sparse phase begins, above ``begin_at + last_dense`` and at "
        "most 1.",
    )
    cycles: int | Literal["auto"] = option(
        default="auto",
        check=_check_cycles,
        doc=f'number of sparse phases before the last one; ``"auto"``: the paper\'s {PAPER_CYCLES}, or fewer, at least '
        "two, where a phase would be shorter than an epoch.",
    )
    scope: Scope = option(default="global", doc=PRUNING_SCOPE)
    distribution: Distribution | Mapping[str, float] = "uniform"

    def __post_init__(self) -> None:
        """Check what the options are together."""
        super().__post_init__()
        if self.begin_at + self.last_dense >= self.end_at:
            raise ValueError(
                f"begin_at must be below end_at - last_dense={self.end_at - self.last_dense:.6g}, got "
                f"{self.begin_at!r}: the phases lie between. The paper's values are 0.1, 0.85 and 0.1."
            )
        self._alternation = Alternation(self)
        self._dense = DenseTwin()

    @property
    def planned_density(self) -> dict[str, float]:
        """The density of each layer in a sparse phase, unless they compete."""
        return magnitude.planned_density(self)

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Settle the phases, and tell."""
        super().on_train_start(trainer, pl_module)
        refuse_unknown_length(self, self.total_steps, "which it divides into phases")
        for group in self._groups:
            floors(self.units(group.weights), self.min_layer_density, self.final(group))
        phases = self._alternation.phases = self._alternation.divided(int(self.total_steps), epochs(trainer))
        rank_zero_info(
            f"{self!r} alternates: sparse and dense from steps {', '.join(map(str, phases.begins))} on in turn."
        )

    def is_due(self, group: WeightGroup) -> bool:
        """Tell whether another phase begins, or has begun while gradients were not finite."""
        return self._alternation.is_due(group)

    # ------------------------------------------------------------------ compress and decompress

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Begin dense, as all weights are."""

    def final(self, group: WeightGroup) -> int:
        """Return the number of connections, or of units of the pattern, in a sparse phase."""
        return budget(self.sparsity_target, self.num_units(group))

    def plan(self, group: WeightGroup) -> None:
        """Note which phase begins."""
        self._alternation.begin(group)

    def target_count(self, group: WeightGroup) -> int:
        """Return the number of connections, or of units, in the phase that begins."""
        return self.final(group) if self._alternation.is_sparse(group) else self.num_units(group)

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Prune the smallest ``|W|``, or bring all weights back; keep the network that is pruned for good."""
        if not self._alternation.is_sparse(group):
            self._decompress(group)
            return
        if self._alternation.is_last(group) and group.num_active == group.size:
            assert self._fit.module is not None
            self._dense.keep(self._fit.module, {id(weight.parameter) for weight in group.weights})
        total, weights = self.final(group), self.units(group.weights)
        magnitude.prune(weights, self.pattern, total, total, self.scope, self.distribution, self.min_layer_density)

    def _decompress(self, group: WeightGroup) -> None:
        """Bring back all weights, if some are pruned; momentum of before that is of no use."""
        if group.num_active == group.size:
            return
        for weight in group.weights:
            pruned = weight.part.positions(select.positions(~weight.mask))
            weight.rewire(pruned[:0], pruned)
        reset_momentum(group.weights[0].optimizer)

    # ------------------------------------------------------------------ the dense network

    def dense_state_dict(self) -> dict[str, Any]:
        """Return the dense network as the ``state_dict`` of the module: what the last pruning found, on the CPU.

        Processes that hold parts of it call this together, and each gets the whole.

        Raises:
            RuntimeError: the last pruning has not come.
        """
        if not self._dense.values:
            raise RuntimeError(
                f"{self!r} has no dense network yet: it keeps the weights with which its last dense phase ends."
            )
        return self._dense.state_dict()

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:
        """The dense network, too."""
        return [*super().state_tensors, self._dense.values]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell of a training that ended before its last phase."""
        super().on_train_end(trainer, pl_module)
        for group in self._groups:
            if not self._alternation.is_unfinished(group):
                continue
            early = f"{self!r} has not come to its last sparse phase:"
            if group.halted_by:
                self.warn_once(f"{early} gradients of {listed(group.halted_by)} were not finite. {REMEDY}")
            else:
                self.warn_once(
                    f"{early} the training ended after {group.step} steps, before step "
                    f"{self._alternation.phases.begins[-1]}. Set max_epochs or max_steps to what is really trained."
                )

    # ------------------------------------------------------------------ the family's verbs and state

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take the weights over; those that an earlier fit has pruned keep their masks."""
        super().attach(choices, optimizers, resumed)
        if resumed:
            return
        for group in self._groups:
            if group.num_active < group.size:
                self._alternation.begin_pruned(group)
        if self.density == 1:
            self._dense = DenseTwin()

    @torch.no_grad()
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Let the newcomers join the present phase."""
        super().attach_added(choices, optimizer)
        self._groups.of(optimizer).due = True

    def state_dict(self) -> dict[str, Any]:
        """Return masks, phases and the dense network."""
        return {**super().state_dict(), "dense": dict(self._dense.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._dense.load(state_dict["dense"], self._fit.module)

    def divided_state(self, trainer: Any) -> dict[str, Any]:
        """Return the state with a network of which the dense one has the parts."""
        return {**super().divided_state(trainer), "dense": trainer.lightning_module.state_dict()}
