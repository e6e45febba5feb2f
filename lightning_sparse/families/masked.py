"""MaskedCallback: methods that keep a boolean mask beside each weight, which is exactly 0 outside it.

The gradient is masked before every step, so that clipping, momentum and weight decay see the sparse network alone, and
the weight after it, whatever the optimizer has done. Connections move among the weights of one optimizer (a *group*),
at a step whose gradients are whole and averaged over processes, so all processes move the same ones.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.generators import OwnGenerator
from lightning_sparse.compat.lightning import LightningModule, Trainer, rank_zero_info
from lightning_sparse.compat.options import Options, fixed, option
from lightning_sparse.compat.shards import settle_gradient
from lightning_sparse.families import starts
from lightning_sparse.families.common import (
    DISTRIBUTION,
    MIN_LAYER_DENSITY,
    PATTERN,
    SCALE_INIT,
    SPARSITY,
    check_distribution,
    check_min_layer_density,
    check_sparsity,
    leave_misfits,
)
from lightning_sparse.families.fitting_patterns import fitting_pattern
from lightning_sparse.families.moving import move, not_finite
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import patterns
from lightning_sparse.rules.budgets import Distribution
from lightning_sparse.rules.patterns import UNSTRUCTURED
from lightning_sparse.storage import STORES
from lightning_sparse.storage.store import Storage, Store, Stored
from lightning_sparse.trainer.agreement import refuse_broken_clock
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.guards import (
    refuse_capture,
    refuse_other_sparsity,
    warn_of_cautious,
    warn_of_halted,
    warn_of_strays,
)
from lightning_sparse.trainer.shards import refuse_parts_of_units
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup, WeightGroups
from lightning_sparse.weights.units import units

__all__ = ["DenseOnly", "MaskedCallback"]


class MaskedCallback(Stored, SparseCallback):
    """Base of the methods with hard zeros."""

    sparsity_target: float | None = option(alias="sparsity", kw_only=False, check=check_sparsity, doc=SPARSITY)
    initial: str = option(default="random", check=starts.check_initial, doc=starts.INITIAL)
    distribution: Distribution | Mapping[str, float] = option(default="erk", check=check_distribution, doc=DISTRIBUTION)
    min_layer_density: float = option(default=0.0, check=check_min_layer_density, doc=MIN_LAYER_DENSITY)
    pattern_name: str = option(default="unstructured", alias="pattern", check=patterns.check_pattern, doc=PATTERN)
    scale_init: bool = option(
        default=True,
        doc=f"{SCALE_INIT} Each neuron's weights are multiplied by the square root of its fan-in over its number of "
        "connections.",
    )
    seed: int | None = option(
        default=None,
        check=partial(checks.seed, "Leave it out to use the run's seed."),
        doc="of the method's own random generator; default: the seed of the run (``seed_everything``).",
    )
    storage: Storage = option(
        default="masked",
        doc='``"masked"``: dense weights with exact zeros; ``"sparse"``: layers that hold the nonzeros alone, in '
        'memory and time in proportion to them (linear layers and 2-d convolutions only); ``"block"``: the same for '
        '``pattern="block:RxC"``, which takes less of both (linear layers only).',
    )
    plain_checkpoints: bool | None = option(
        default=None,
        doc='with ``storage="sparse"`` or ``"block"``, checkpoints written during a fit have the plain module\'s keys '
        "and dense weights with exact zeros; False: the nonzeros alone; None: dense if that takes no more than 64 MiB.",
    )

    #: what the units of sparsity are: what ``pattern_name`` says, unless a class has another
    pattern = UNSTRUCTURED

    #: kinds of patterns that the method cannot have, and why
    unfit_patterns: ClassVar[Mapping[str, str]] = {}

    must_stay: ClassVar[Sequence[str]] = ("pattern",)

    #: the step at which connections are moved applies no update of the optimizer
    skips_update = False

    needs_whole_gradients = False
    takes_tensor_parallel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.initial = os.fspath(self.initial)
        self.pattern, self.sparsity_target = fitting_pattern(self)
        starts.check_number(self.sparsity_target, self.initial)
        self.store: Store = STORES[self.storage](self)
        self.generator: Generator = OwnGenerator()
        self._weights: dict[str, Weight] = {}
        self._groups = WeightGroups()
        self._epoch = 0

    # ------------------------------------------------------------------ what a method defines

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Choose the masks a fit starts with, as ``initial`` says."""
        starts.begin(self, weights, self.sparsity_target)

    @property
    def keeps_weights(self) -> bool:
        """The network is there already: the weights that stay active keep their values as they are."""
        return starts.start(self.initial).keeps_weights

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Return further tensors of a weight's state, of its shape."""
        return {}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """See the dense gradients (times ``scale``) of every step."""

    def is_due(self, group: WeightGroup) -> bool:
        """Tell whether the connections of ``group`` are to be moved at this step."""
        return False

    def plan(self, group: WeightGroup) -> None:
        """Note what a move is about to do, in ``group.values``."""

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Move connections, or units of the pattern, with ``Weight.rewire``.

        Gradients are dense, finite and times ``scale``.
        """

    def target_count(self, group: WeightGroup) -> int | None:
        """Return how many units the weights of ``group`` have after a move; None: as many as before."""
        return None

    def updated(self, weights: Sequence[Weight]) -> None:
        """See the weights after every update, before they are masked."""

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return masks, buffers, clocks and the random generator: tensors and plain values only."""
        return {
            **super().state_dict(),
            **({} if self.sparsity_target is None else {"sparsity": self.sparsity_target}),
            "epoch": self._epoch,
            "begun": dict(self._before_fit),
            "clocks": {str(index): clock for index, clock in enumerate(self._groups.clocks)},
            "generator": self.generator.get_state(),
            **self.store.state_dict(self._weights),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; into the weights in use if fit has begun."""
        refuse_other_sparsity(self, state_dict.get("sparsity"), self.sparsity_target)
        self._epoch = state_dict["epoch"]
        for clock in state_dict["clocks"].values():
            refuse_broken_clock(self, clock, ["step"])
        self._groups.clocks = list(state_dict["clocks"].values())
        self.generator.set_state(state_dict["generator"].cpu())
        loaded = {n: self.store.load_weight(n, state, self._weights) for n, state in state_dict["weights"].items()}
        self.store.load_state_dict(state_dict)
        if self._fit.module is not None:
            for name, weight in self._weights.items():
                self.store.restore(weight, loaded[name])
        else:
            self._weights = loaded
        super().load_state_dict(state_dict)

    # ------------------------------------------------------------------ units

    def units(self, weights: Sequence[Weight]) -> list[Weight]:
        """Return weights whose connections are the units of the pattern: blocks, rows, or the connections there are."""
        return units(weights, self.pattern)

    def num_units(self, group: WeightGroup) -> int:
        """Return how many units the weights of a group have, active or not."""
        return sum(weight.size for weight in self.units(group.weights))

    def num_active(self, group: WeightGroup) -> int:
        """Return how many units of a group are active."""
        return sum(weight.num_active for weight in self.units(group.weights))

    def choices_in(self, module: nn.Module) -> list[ParameterChoice]:
        """Leave weights dense that cannot have the pattern."""
        return leave_misfits(super().choices_in(module), self.pattern, self.pattern_name)

    # ------------------------------------------------------------------ verbs

    @property
    def needs_whole_weights(self) -> str | None:
        """None where the store keeps parts of a weight, as it does of masks."""
        return None if self.store.keeps_parts else f"Use storage='masked', got {self.storage!r}, or strategy='ddp'."

    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise if a group of N:M, a row or a block may lie on several processes."""
        super().refuse_choices(choices)
        refuse_parts_of_units(self, choices, self.pattern)

    @property
    def planned_density(self) -> dict[str, float]:
        """The density that each layer begins with."""
        return self.layer_density

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over, and warn if they were trained ones that are lost."""
        super().on_fit_start(trainer, pl_module)
        starts.warn_of_trained(self, pl_module, self._weights)
        warn_of_cautious(self, trainer)
        if self.scale_init and self.keeps_weights:
            rank_zero_info(f"{self!r} keeps the weights that are there, so it does not scale them.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch; the weights, of a checkpoint or not, are there with all strategies now."""
        super().on_train_start(trainer, pl_module)
        if self._fit.restored_late and not self._restored:
            starts.refuse_found_number(self, self._weights)

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        clocks = self._groups.clocks
        adoption, self._weights = self.store.adopt(choices, self._weights, resumed)
        self._groups.begin(optimizers, self._weights)
        if adoption == "resumed":
            self._groups.clocks = clocks
            self._fit.drawn.clear()
        else:
            self._epoch = 0
        if adoption == "fresh":
            self.draw(list(self._weights.values()), self.run_seed)
            if not self._fit.restored_late:
                starts.refuse_found_number(self, self._weights)
            self._add_buffers(self._weights.values())

    @torch.no_grad()
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        refuse_parts_of_units(self, choices, self.pattern)
        new = self.store.add(choices)
        self._weights.update(new)
        self._groups.join(optimizer, new)
        self.initial_masks(list(new.values()))
        self._add_buffers(new.values())
        assert self._fit.module is not None
        starts.warn_of_trained(self, self._fit.module, self._weights)

    def draw(self, weights: Sequence[Weight], run_seed: int) -> None:  # noqa: D102
        self.run_seed = run_seed
        self.generator.manual_seed(run_seed if self.seed is None else self.seed)
        self.initial_masks(weights)

    def refuse_number(self, weights: Sequence[Weight]) -> None:  # noqa: D102
        starts.refuse_found(self, weights)
        starts.refuse_other_pattern(self, weights)
        starts.refuse_other_number(self, weights, self.sparsity_target, self.surplus)

    def refuse_made_sparse(self, names: Sequence[str]) -> None:  # noqa: D102
        starts.refuse_made_sparse(self, names)

    def _add_buffers(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            weight.buffers = self.new_buffers(weight)
            weight.keep_zeros()

    def gradient_positions(self, name: str) -> Tensor | None:
        """Return the active positions, unless the next step moves connections or the method uses all gradients."""
        weight = self._weights[name]
        assert weight.optimizer is not None
        group = self._groups.of(weight.optimizer)
        return None if self.needs_whole_gradients or group.due or self.is_due(group) else weight.active_indices

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: D102
        self._epoch = epoch

    def take_writes(self, by_value: bool, optimizer: Optimizer | None = None) -> None:
        """Keep what was written into connections, and nothing else: they stay as they are."""
        weights = self._weights.values() if optimizer is None else self._groups.of(optimizer).weights
        for weight in weights:
            parameter = weight.parameter
            if parameter is None or not (by_value or self._fit.traces.differs(parameter)):
                continue
            strays = weight.strays
            if strays:
                weight.keep_zeros()
                warn_of_strays(self, weight.name, strays)
            self._fit.traces.note(parameter)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        refuse_capture(self)
        if share:
            self.take_writes(self._fit.looks.due(), optimizer)
        group = self._groups.of(optimizer)
        group.moved = False  # in a step that AMP has skipped
        weights = [w for w in group.weights if w.parameter is not None and w.parameter.grad is not None]
        for weight in weights:
            settle_gradient(weight.parameter)
        if share and weights:
            self.observe(weights, scale)
            group.due = group.due or self.is_due(group)
            if group.due:  # AMP skips a step that overflowed, and its gradients are no scores: the next step moves
                group.halted_by = not_finite(self._fit, weights, optimizer)
            if group.due and not group.halted_by:
                group.due = False
                group.moved = move(self, weights, group, scale)
            group.step += 1
        if share:
            group.zeroing.keep_zero_gradients(weights)
            return
        for weight in weights:
            if weight.parameter is not None:
                weight.parameter.grad = None

    def before_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        group = self._groups.of(optimizer)
        if group.moved and self.skips_update:  # only now: a gradient scaler has to see gradients
            for parameters in optimizer.param_groups:
                for parameter in parameters["params"]:
                    parameter.grad = None
        group.moved = False

    @torch.no_grad()
    def after_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        group = self._groups.of(optimizer)
        self.updated(group.weights)
        group.zeroing.keep_zeros(group.weights)
        for weight in group.weights:
            if weight.parameter is not None:
                self._fit.traces.note(weight.parameter)

    @torch.no_grad()
    def abort_update(self) -> None:  # noqa: D102
        for weight in self._weights.values():
            if weight.parameter is not None:
                weight.keep_zeros()

    def warn_at_epoch_end(self) -> None:
        """Warn of connections that could not move for gradients that are not finite."""
        super().warn_at_epoch_end()
        warn_of_halted(self, sorted({name for group in self._groups for name in group.halted_by}))


class DenseOnly(Options):
    """A method that needs dense tensors, so it has no choice of store; it stands before the family in the bases."""

    storage: Storage = fixed(default="masked")
    plain_checkpoints: bool | None = fixed(default=None)
