"""MaskedCallback: methods that keep a boolean mask beside each weight, which is exactly 0 outside it.

The gradient is masked before every step, so that clipping, momentum and weight decay see the sparse network alone, and
the weight after it, whatever the optimizer has done. Connections move among the weights of one optimizer (a *pool*),
at a step whose gradients are whole and averaged over processes, so all processes move the same ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import budgets, sampling
from lightning_sparse.rules.budgets import Distribution, budget, layer_counts, least
from lightning_sparse.trainer.callback import SparseCallback, refuse_other_sparsity, refuse_other_weights
from lightning_sparse.weights.base import MaskedWeight, Pool, Weight, all_finite, finite

__all__ = ["MaskedCallback"]


class MaskedCallback(SparseCallback):
    """Base of the methods with hard zeros.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        distribution: how the active weights are divided among layers: ``"erk"``, ``"er"``, ``"uniform"``,
            ``"uniform_first_dense"``, or a density for each glob pattern on parameter names.
        min_layer_density: no layer falls below this density.
        seed: of the method's own random generator; default: the seed of the run (``seed_everything``).
        include: see ``SparseCallback``.
        exclude: see ``SparseCallback``.
        log_every_n_steps: see ``SparseCallback``.
    """

    _weights: dict[str, Weight]
    _pools: dict[int, Pool]

    def __init__(
        self,
        sparsity: float,
        distribution: Distribution | Mapping[str, float] = "erk",
        min_layer_density: float = 0.0,
        seed: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(include, exclude, log_every_n_steps)
        budgets.check(sparsity, distribution, min_layer_density)
        if seed is not None:
            checks.integer(0, "Leave it out to use the run's seed.", seed=seed)
        self.sparsity_target = self.initial_sparsity = sparsity
        self.distribution = distribution
        self.min_layer_density = min_layer_density
        self.seed = seed
        self.generator = torch.Generator()
        self._pools = {}
        self._epoch = 0
        self._clocks: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ what a method defines

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Draw the masks a fit starts with: random ones, with the counts that ``distribution`` gives."""
        shapes = {weight.name: weight.shape for weight in weights}
        total = budget(self.initial_sparsity, sum(weight.size for weight in weights))
        counts = layer_counts(self.distribution, shapes, total, self.min_layer_density)
        for weight in weights:
            weight.start(sampling.distinct(counts[weight.name], weight.size, self.generator), self.generator)

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Return further tensors of a weight's state, of its shape."""
        return {}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """See the dense gradients (times ``scale``) of every step."""

    def is_due(self, pool: Pool) -> bool:
        """Tell whether the connections of ``pool`` are to be moved at this step."""
        return False

    def move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> None:
        """Move connections with ``Weight.exchange``; the gradients are dense, finite and times ``scale``."""

    def updated(self, weights: Sequence[Weight]) -> None:
        """See the weights after every update, before they are masked."""

    #: the step at which connections are moved applies no update of the optimizer
    skips_update: bool = False

    def asked(self, pool: Pool) -> int | None:
        """Return how many connections the weights of ``pool`` must have after a move; None: as many as before."""
        return None

    def least(self, weight: Weight) -> int:
        """Return how many connections ``min_layer_density`` leaves to a weight at least."""
        return least(self.min_layer_density, weight.size)

    # ------------------------------------------------------------------ what users read

    @property
    def masks(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: weight.mask for name, weight in self._weights.items()}

    @property
    def layer_count(self) -> dict[str, int]:  # noqa: D102  (inherited)
        return {name: weight.active for name, weight in self._weights.items()}

    def mask(self, name: str) -> Tensor:  # noqa: D102  (inherited)
        return self._weights[name].mask

    @property
    def connections(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: weight.connections for name, weight in self._weights.items()}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return masks, buffers, clocks and the random generator: tensors and plain values only."""
        clocks = [pool.clock for pool in self._pools.values()] or self._clocks
        return {
            "lightning_sparse": type(self).__name__,
            "sparsity": self.sparsity_target,
            "epoch": self._epoch,
            "begun": dict(self._begun),
            "clocks": {str(index): clock for index, clock in enumerate(clocks)},
            "generator": self.generator.get_state(),
            "weights": {name: weight.state() for name, weight in self._weights.items()},
        }

    def loaded_weight(self, name: str, state: dict[str, Any]) -> Weight:
        """Return a weight with the state of a checkpoint."""
        return MaskedWeight(name, state["mask"].bool(), buffers=dict(state["buffers"]))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; into the weights in use if fit has begun."""
        refuse_other_sparsity(self, state_dict["sparsity"], self.sparsity_target)
        self._epoch = state_dict["epoch"]
        self._clocks = list(state_dict["clocks"].values())
        self.generator.set_state(state_dict["generator"].cpu())
        loaded = {name: self.loaded_weight(name, state) for name, state in state_dict["weights"].items()}
        if self._module is None:
            self._weights = loaded
        else:
            for name, weight in self._weights.items():
                _place(weight, loaded[name])
            self._set_clocks()
        super().load_state_dict(state_dict)

    # ------------------------------------------------------------------ verbs

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        shapes = {choice.name: choice.shape for choice in choices}
        held = {name: weight.shape for name, weight in self._weights.items()}
        state = self._weights
        if resumed and state:  # none in a checkpoint from before the fit, as LearningRateFinder writes it
            refuse_other_weights(self, shapes, held)
        else:
            if state and not (held == shapes and all(map(_fits, choices, (state[name] for name in shapes)))):
                self._warn_of_other_weights()
                state = {}
            self._epoch, self._clocks = 0, []
        if not state:
            self.generator.manual_seed(self.run_seed if self.seed is None else self.seed)
        self._weights = {choice.name: _new(choice) for choice in choices}
        self._pools = {id(optimizer): Pool() for optimizer in optimizers}
        for optimizer in optimizers:
            self._join(optimizer, self._weights)
        if state:
            for name, weight in self._weights.items():
                _place(weight, state[name])
        else:
            self._begin(list(self._weights.values()))
        self._set_clocks()

    @torch.no_grad()
    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        new = {choice.name: _new(choice) for choice in choices}
        self._weights.update(new)
        self._join(optimizer, new)
        self._begin(list(new.values()))

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: D102
        self._epoch = epoch

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        pool = self._pools.get(id(optimizer), Pool())
        pool.moved = False  # in a step that AMP has skipped
        weights = [w for w in pool.weights if w.parameter is not None and w.parameter.grad is not None]
        if share and weights:
            self.observe(weights, scale)
            pool.due = pool.due or self.is_due(pool)
            # AMP skips a step that overflowed, and its gradients are no scores: the next step moves
            if pool.due and finite(weights) and all(map(all_finite, _gradients(optimizer))):
                pool.due = False
                pool.moved = self._move(weights, pool, scale)
            pool.step += 1
        for weight in weights:
            if share:
                weight.keep_zero_gradients()
            elif weight.parameter is not None:
                weight.parameter.grad = None

    def enter_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        pool = self._pools.get(id(optimizer), Pool())
        if pool.moved and self.skips_update:  # only now: a gradient scaler has to see gradients
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        pool.moved = False

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        weights = self._pools.get(id(optimizer), Pool()).weights
        self.updated(weights)
        for weight in weights:
            weight.keep_zeros()

    @torch.no_grad()
    def leave_step(self) -> None:  # noqa: D102
        for weight in self._weights.values():
            if weight.parameter is not None:
                weight.keep_zeros()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._clocks = [pool.clock for pool in self._pools.values()]
            self._pools = {}
            for weight in self._weights.values():
                weight.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer, the module and the optimizers."""
        clocks = [pool.clock for pool in self._pools.values()] or self._clocks
        generator = bytes(self.generator.get_state().tolist())  # a passing tensor does not reach a spawned process
        return {**super().__getstate__(), "generator": generator, "_pools": {}, "_clocks": clocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the random generator up where it was."""
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(state["generator"]), dtype=torch.uint8))
        self.__dict__.update({**state, "generator": generator})

    # ------------------------------------------------------------------ inside

    def _join(self, optimizer: Optimizer, weights: Mapping[str, Weight]) -> None:
        """Note which weights ``optimizer`` trains."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in weights.values():
            if id(weight.parameter) in owned:
                weight.optimizer = optimizer
                self._pools[id(optimizer)].weights.append(weight)

    def _begin(self, weights: Sequence[Weight]) -> None:
        self.initial_masks(weights)
        for weight in weights:
            weight.buffers = self.new_buffers(weight)
            weight.keep_zeros()

    def _move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> bool:
        """Move connections, make sure that their number is what was asked for, and tell whether any moved."""
        connections = [weight.connections for weight in weights]
        before = sum(weight.active for weight in pool.weights)
        self.move(weights, pool, scale)
        asked, after = self.asked(pool), sum(weight.active for weight in pool.weights)
        if after != (before if asked is None else asked):
            raise RuntimeError(
                f"{type(self).__name__} has {after} active weights after moving connections, not "
                f"{before if asked is None else asked}. Please report this."
            )
        return any(weight.connections is not then for weight, then in zip(weights, connections, strict=True))

    def _set_clocks(self) -> None:
        for pool, clock in zip(self._pools.values(), self._clocks, strict=False):
            pool.clock = clock


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the gradients of all that ``optimizer`` trains."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad._values() if parameter.grad.is_sparse else parameter.grad


def _new(choice: ParameterChoice) -> Weight:
    mask = torch.ones_like(choice.parameter, dtype=torch.bool, requires_grad=False)
    return MaskedWeight(choice.name, mask, parameter=choice.parameter, transposed_groups=choice.transposed_groups)


def _place(weight: Weight, state: Weight) -> None:
    assert isinstance(weight, MaskedWeight)
    assert isinstance(state, MaskedWeight)
    weight.restore(state)


def _fits(choice: ParameterChoice, state: Weight) -> bool:
    """Tell whether a parameter is 0 wherever an earlier fit left it inactive."""
    return not bool((choice.parameter.cpu() != 0).logical_and_(~state.mask.cpu()).any())
