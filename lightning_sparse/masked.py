"""MaskedCallback: methods that keep a boolean mask beside each weight, which is exactly 0 outside it.

The gradient is masked before every step, so that clipping, momentum and weight decay see the sparse network alone, and
the weight after it, whatever the optimizer has done. Connections move among the weights of one optimizer (a *pool*),
at a step whose gradients are whole and averaged over processes, so all processes move the same ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import checks, distributions, masks, sampling
from lightning_sparse._lightning import rank_zero_warn
from lightning_sparse.callback import SparseCallback, refuse_other_sparsity, refuse_other_weights
from lightning_sparse.distributions import budget, layer_counts, least
from lightning_sparse.layers import Choice

__all__ = ["MaskedCallback", "MaskedWeight", "Pool", "finite"]


@dataclass(eq=False)
class MaskedWeight:
    """One weight that trains sparse.

    Attributes:
        name: the parameter's name in the LightningModule.
        mask: where it is active, a boolean tensor of its shape; exchanged as a whole, never written in place.
        buffers: further tensors of the parameter's shape that belong to the method's state.
        parameter: the module's parameter; None outside fit.
        optimizer: the one that trains it; None outside fit.
        transposed_groups: see ``layers.Choice``.
    """

    name: str
    mask: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    parameter: nn.Parameter | None = None
    optimizer: Optimizer | None = None
    transposed_groups: int = 0
    _places: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.mask.shape)

    @property
    def size(self) -> int:
        """Number of connections there might be."""
        return math.prod(self.shape)

    @property
    def active(self) -> int:
        """Number of active connections."""
        return masks.count(self.mask)

    @property
    def room(self) -> int:
        """Number of connections that may be grown."""
        return self.size - self.active

    @property
    def connections(self) -> Tensor:
        """A tensor that is another object after connections have been moved."""
        return self.mask

    @property
    def places(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the weight's device. Found once between moves."""
        if self._places is None or self._places[0] is not self.mask:
            self._places = self.mask, masks.positions(self.mask)
        return self._places[1]

    def forget_places(self) -> None:
        """Let go of ``places``, eight bytes a connection, which nobody needs until the next move."""
        self._places = None

    @property
    def positions(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the CPU."""
        return self.places.cpu()

    @property
    def magnitudes(self) -> Tensor:
        """``|W|`` of the active connections, in the order of their positions."""
        return self.W.reshape(-1).index_select(0, self.places).abs_()

    @property
    def slopes(self) -> Tensor:
        """``|dP|`` of the active connections, in the order of their positions."""
        return self.dP.reshape(-1).index_select(0, self.places).abs_()

    @property
    def W(self) -> Tensor:
        """The weight's values."""
        assert self.parameter is not None
        return self.parameter.data

    @property
    def dP(self) -> Tensor:
        """The weight's gradient: dense until it is masked, with values at connections that do not exist, too."""
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return self.parameter.grad

    @property
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that are not active."""
        return all_finite(self.dP)

    def change(self, dropped: Tensor, grown: Tensor, value: float = 0.0) -> None:
        """Take connections away and put others in, all with fresh optimizer state.

        Args:
            dropped: boolean, of the parameter's shape; these become exactly 0.
            grown: boolean, of the parameter's shape, nowhere active before unless dropped; these get ``value``.
            value: the values of the grown.
        """
        if not (dropped.any() or grown.any()):
            return
        self.mask = self.mask.clone().logical_and_(~dropped).logical_or_(grown)  # in the parameter's layout
        untouched = ~(dropped | grown)
        masks.zero_outside_(self.W, untouched)
        if value:
            self.W.masked_fill_(grown, value)
        for state in self.optimizer_state():
            masks.zero_outside_(state, untouched)

    def keep_largest(self, count: int) -> None:
        """Prune all but the ``count`` connections of largest ``|W|``."""
        kept = masks.top_k(self.W.abs(), count, among=self.mask)
        self.change(self.mask & ~kept, torch.zeros_like(kept))

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return the gradients of some connections, active or not, given by flat positions."""
        return self.dP.reshape(-1)[positions.to(self.dP.device)]

    def free_sample(self, stride: int) -> Tensor:
        """Return ``|dP|`` of the inactive ones among every ``stride``-th connection."""
        return self.dP.reshape(-1)[::stride].abs()[~self.mask.reshape(-1)[::stride]]

    def smallest(self, n: int, scores: Tensor | None = None) -> Tensor:
        """Return the flat positions of the ``n`` active connections of smallest ``|W|``, ascending.

        Args:
            n: how many; of equals the earlier position's.
            scores: what counts instead of ``|W|``, in the order of positions.
        """
        return self.places[masks.lowest_positions(self.magnitudes if scores is None else scores, n)]

    def steepest(self, n: int, above: float = -1.0) -> tuple[Tensor, Tensor]:
        """Return the flat positions of the ``n`` inactive connections of largest ``|dP|``, ascending, and these.

        Args:
            n: how many at most; of equals the earlier position's.
            above: only what is larger counts.
        """
        likely = masks.likely_bound(self.size, n, lambda stride: [self.free_sample(stride)]) if above < 0 else None
        found = self._free_above(above if likely is None else float(likely))
        if likely is not None and len(found) < n:  # the sample was misleading
            found = self._free_above(above)
        slopes = self.dP.reshape(-1)[found].abs()
        if len(found) > n:
            best = masks.top_k_positions(slopes, n)
            found, slopes = found[best], slopes[best]
        return found.cpu(), slopes.cpu()

    def start(self, positions: Tensor, generator: Generator) -> None:
        """Have active connections at these flat positions, and no others; ``generator`` is for values not yet drawn."""
        self.mask = torch.zeros(self.shape, dtype=torch.bool, device=self.mask.device)
        masks.put_(self.mask, positions.to(self.mask.device), True)

    def exchange(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections, with fresh optimizer state.

        Args:
            dropped: flat positions of active connections, ascending.
            grown: flat positions, different, not active before unless dropped.
            value: the values of the grown, or one for all.
        """
        self.forget_places()
        if not (len(dropped) or len(grown)):
            return
        dropped, grown = dropped.to(self.mask.device), grown.to(self.mask.device)
        self.mask = self.mask.clone()
        masks.put_(self.mask, dropped, False)
        masks.put_(self.mask, grown, True)
        for state in self.optimizer_state():
            masks.put_(state, dropped, 0.0)
            masks.put_(state, grown, 0.0)
        masks.put_(self.W, dropped, 0.0)
        masks.put_(self.W, grown, value)

    def keep_zeros(self) -> None:
        """Set to 0 what is not active."""
        masks.zero_outside_(self.W, self.mask)

    def keep_zero_gradients(self) -> None:
        """Set to 0 the gradients of what is not active."""
        masks.zero_outside_(self.dP, self.mask)

    def detach(self) -> None:
        """Let go of the module and the optimizer; keep the state on the CPU."""
        self.parameter = self.optimizer = self._places = None
        self.mask = self.mask.cpu()
        self.buffers = {key: buffer.cpu() for key, buffer in self.buffers.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"mask": self.mask, "buffers": dict(self.buffers)}

    def _free_above(self, floor: float) -> Tensor:
        """Return the flat positions of the inactive connections whose ``|dP|`` is above ``floor``, ascending."""
        above = self.dP.reshape(-1).abs().gt(floor)
        return masks.positions(torch.gt(above, self.mask.reshape(-1), out=above))

    def optimizer_state(self) -> Iterable[Tensor]:
        """Yield what the optimizer keeps for each element: momentum, moments."""
        assert self.optimizer is not None
        assert self.parameter is not None
        for state in self.optimizer.state.get(self.parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == self.mask.shape:
                yield state

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        return {**self.__dict__, "parameter": None, "optimizer": None, "_places": None}


@dataclass(eq=False)
class Pool:
    """The weights of one optimizer, among which connections may move, and its clock.

    Attributes:
        weights: in the order of the module.
        step: the number of optimizer steps so far.
        due: the connections are to be moved at the next step with usable gradients.
        moved: connections have been moved in the step that is under way.
        values: further numbers of the method's state.
    """

    weights: list[MaskedWeight] = field(default_factory=list)
    step: int = 0
    due: bool = False
    moved: bool = False
    values: dict[str, float] = field(default_factory=dict)

    @property
    def clock(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pool."""
        return {"step": self.step, "due": self.due, "values": dict(self.values)}

    @clock.setter
    def clock(self, clock: Mapping[str, Any]) -> None:
        self.step, self.due, self.values = clock["step"], clock["due"], dict(clock["values"])


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

    _pools: dict[int, Pool]

    def __init__(
        self,
        sparsity: float,
        distribution: str | Mapping[str, float] = "erk",
        min_layer_density: float = 0.0,
        seed: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(include, exclude, log_every_n_steps)
        distributions.check(sparsity, distribution, min_layer_density)
        if seed is not None:
            checks.integer(0, "Leave it out to use the run's seed.", seed=seed)
        self.sparsity_target = self.initial_sparsity = sparsity
        self.distribution = distribution
        self.min_layer_density = min_layer_density
        self.seed = seed
        self.generator = torch.Generator()
        self._weights: dict[str, MaskedWeight] = {}
        self._pools = {}
        self._epoch = 0
        self._clocks: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ what a method defines

    def initial_masks(self, weights: Sequence[MaskedWeight]) -> None:
        """Draw the masks a fit starts with: random ones, with the counts that ``distribution`` gives."""
        shapes = {weight.name: weight.shape for weight in weights}
        total = budget(self.initial_sparsity, sum(weight.size for weight in weights))
        counts = layer_counts(self.distribution, shapes, total, self.min_layer_density)
        for weight in weights:
            weight.start(sampling.distinct(counts[weight.name], weight.size, self.generator), self.generator)

    def new_buffers(self, weight: MaskedWeight) -> dict[str, Tensor]:
        """Return further tensors of a weight's state, of its shape."""
        return {}

    def observe(self, weights: Sequence[MaskedWeight], scale: float) -> None:
        """See the dense gradients (times ``scale``) of every step."""

    def is_due(self, pool: Pool) -> bool:
        """Tell whether the connections of ``pool`` are to be moved at this step."""
        return False

    def move(self, weights: Sequence[MaskedWeight], pool: Pool, scale: float) -> None:
        """Move connections with ``MaskedWeight.change``; the gradients are dense, finite and times ``scale``."""

    def updated(self, weights: Sequence[MaskedWeight]) -> None:
        """See the weights after every update, before they are masked."""

    #: the step at which connections are moved applies no update of the optimizer
    skips_update: bool = False

    def asked(self, pool: Pool) -> int | None:
        """Return how many connections the weights of ``pool`` must have after a move; None: as many as before."""
        return None

    def least(self, weight: MaskedWeight) -> int:
        """Return how many connections ``min_layer_density`` leaves to a weight at least."""
        return least(self.min_layer_density, weight.size)

    # ------------------------------------------------------------------ what users read

    @property
    def masks(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: weight.mask for name, weight in self._weights.items()}

    @property
    def layer_density(self) -> dict[str, float]:  # noqa: D102  (inherited)
        return {name: weight.active / weight.size for name, weight in self._weights.items()}

    @property
    def density(self) -> float:  # noqa: D102  (inherited)
        weights = self._weights.values()
        if not weights:
            return super().density  # which raises
        return sum(weight.active for weight in weights) / sum(weight.size for weight in weights)

    def mask(self, name: str) -> Tensor:  # noqa: D102  (inherited)
        return self._weights[name].mask

    @property
    def connections(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: weight.connections for name, weight in self._weights.items()}

    @property
    def held(self) -> list[Mapping[str, Any]]:  # noqa: D102  (inherited)
        return [vars(weight) for weight in self._weights.values()]

    @property
    def gradient_density(self) -> float:
        """Share of all selected weights whose gradient is used."""
        return self.density

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return masks, buffers, clocks and the random generator: tensors and plain values only."""
        clocks = [pool.clock for pool in self._pools.values()] or self._clocks
        return {
            "lightning_sparse": type(self).__name__,
            "sparsity": self.sparsity_target,
            "epoch": self._epoch,
            "clocks": {str(index): clock for index, clock in enumerate(clocks)},
            "generator": self.generator.get_state(),
            "weights": {name: weight.state() for name, weight in self._weights.items()},
        }

    def loaded_weight(self, name: str, state: dict[str, Any]) -> MaskedWeight:
        """Return a weight with the state of a checkpoint."""
        return MaskedWeight(name, state["mask"].bool(), dict(state["buffers"]))

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
    def attach(self, choices: Sequence[Choice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        shapes = {choice.name: choice.shape for choice in choices}
        held = {name: weight.shape for name, weight in self._weights.items()}
        state = self._weights
        if resumed and state:  # none in a checkpoint from before the fit, as LearningRateFinder writes it
            refuse_other_weights(self, shapes, held)
        else:
            if state and not (held == shapes and all(map(_fits, choices, (state[name] for name in shapes)))):
                rank_zero_warn(
                    f"This {type(self).__name__} holds the state of an earlier fit of other weights: it starts afresh."
                )
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
    def attach_more(self, choices: Sequence[Choice], optimizer: Optimizer) -> None:  # noqa: D102
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

    def _join(self, optimizer: Optimizer, weights: Mapping[str, MaskedWeight]) -> None:
        """Note which weights ``optimizer`` trains."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in weights.values():
            if id(weight.parameter) in owned:
                weight.optimizer = optimizer
                self._pools[id(optimizer)].weights.append(weight)

    def _begin(self, weights: Sequence[MaskedWeight]) -> None:
        self.initial_masks(weights)
        for weight in weights:
            weight.mask = torch.empty_like(weight.W, dtype=torch.bool).copy_(weight.mask)
            weight.buffers = self.new_buffers(weight)
            weight.keep_zeros()

    def _move(self, weights: Sequence[MaskedWeight], pool: Pool, scale: float) -> bool:
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


def all_finite(x: Tensor) -> bool:
    """Tell whether all elements are finite."""
    return not x.numel() or all(bool(extreme.isfinite()) for extreme in x.aminmax())


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the gradients of all that ``optimizer`` trains."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad._values() if parameter.grad.is_sparse else parameter.grad


def finite(weights: Sequence[MaskedWeight]) -> bool:
    """Tell whether all gradients are finite: AMP skips a step in which they are not."""
    return all(weight.finite for weight in weights)


def _new(choice: Choice) -> MaskedWeight:
    mask = torch.ones_like(choice.parameter, dtype=torch.bool, requires_grad=False)
    return MaskedWeight(choice.name, mask, parameter=choice.parameter, transposed_groups=choice.transposed_groups)


def _place(weight: MaskedWeight, state: MaskedWeight) -> None:
    """Give ``weight`` the mask and the buffers of ``state``, in its own memory layout and on its own device."""
    weight.mask = torch.empty_like(weight.mask).copy_(state.mask)
    weight.buffers = {
        key: torch.empty_like(weight.mask, dtype=buffer.dtype).copy_(buffer) for key, buffer in state.buffers.items()
    }
    weight.keep_zeros()


def _fits(choice: Choice, state: MaskedWeight) -> bool:
    """Tell whether a parameter is 0 wherever an earlier fit left it inactive."""
    return not bool((choice.parameter.cpu() != 0).logical_and_(~state.mask.cpu()).any())
