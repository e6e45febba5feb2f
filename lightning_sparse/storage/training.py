"""``storage="sparse"``: a method's weights as layers that hold their nonzeros alone, from before the optimizer is made.

The layers are exchanged after ``configure_model``: the module is whole by then, and neither its checkpoint has been
loaded nor its optimizer been made. Then a weight's only parameter is the vector of its values, so gradients, optimizer
state and what processes average have that size, too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import checks, masks
from lightning_sparse._lightning import (
    DDPStrategy,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_sparse.callback import refuse_other_weights
from lightning_sparse.distributions import budget
from lightning_sparse.endpoints import Hooks
from lightning_sparse.layers import Choice, choose
from lightning_sparse.masked import MaskedCallback, MaskedWeight, Pool
from lightning_sparse.storage import functional
from lightning_sparse.storage.checkpoint import load_for, make_state_sparse, sparse_entries
from lightning_sparse.storage.layers import SparseLayer, SparseLinear, make_dense_, make_sparse_, to_dense
from lightning_sparse.storage.measure import DENSE, measure
from lightning_sparse.storage.memory import give_back
from lightning_sparse.storage.processes import Ignored, average_gradients, copy_from_first
from lightning_sparse.storage.structure import CSR, csr

__all__ = ["DENSE_LIMIT", "STORAGES", "Capture", "SparseStorage", "SparseWeight"]

STORAGES = ("masked", "sparse")

#: bytes of dense weights up to which checkpoints hold them, and a module is made dense again when the fit ends
DENSE_LIMIT = 2 << 30

_CHUNK = 1 << 22  # bytes of a gradient to compute at once, if one row has not more

_SPARED_FROM = 1 << 18  # nonzeros of a layer, for whose indices it pays to give freed memory back

_INDICES = ("crow", "col", "weight_shape", "transposed_crow", "transposed_col", "permutation")


class SparseWeight(MaskedWeight):
    """One weight of which the active connections alone exist; ``parameter`` is the vector of their values.

    Args:
        name: of the dense weight in the LightningModule.
        shape: its shape.
        layer: the layer that holds it, which ``start`` makes sparse; None outside fit.
    """

    def __init__(self, name: str, shape: Sequence[int], layer: nn.Module | None = None) -> None:
        self.name = name
        self.layer = layer
        self.buffers = {}
        self.optimizer = None
        self.transposed_groups = 0
        self.parameter = layer.values if isinstance(layer, SparseLayer) else None
        #: inputs and output gradients of the calls that make up the gradient, if the connections are to be moved
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._reduce: Callable[[Tensor], Tensor] = torch.Tensor.detach
        self._drawn = False
        self._shape = tuple(shape)
        self._positions: Tensor | None = None

    @property
    def sparse(self) -> SparseLayer:
        """The layer that holds the values."""
        assert isinstance(self.layer, SparseLayer)
        return self.layer

    @property
    def known(self) -> bool:
        """The connections are known: from the layer, or from an earlier fit in this process."""
        return self.layer is not None or self._positions is not None

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self._shape

    @property
    def active(self) -> int:  # noqa: D102  (inherited)
        return len(self.positions) if self.layer is None else self.sparse.nnz

    @property
    def connections(self) -> Tensor:  # noqa: D102  (inherited)
        return self.sparse.crow  # whoever holds it to see whether they move does not hold much

    @property
    def places(self) -> Tensor:  # noqa: D102  (inherited)
        if self.layer is not None:
            return self.sparse.positions
        if self._positions is None:
            raise RuntimeError(f"The connections of {self.name} are in the module's part of the checkpoint.")
        return self._positions

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        """Where the weight is active, of the dense shape: made when asked for, for users alone."""
        marks = torch.zeros(self.size, dtype=torch.bool)
        marks[self.positions] = True
        return marks.view(self.shape)

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.W.abs()

    @property
    def slopes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.abs()

    @property
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that do not exist, for a bound on them is."""
        bound = torch.zeros((), dtype=self._exact, device=self.W.device)
        for h, delta in self.calls:
            if delta.numel():
                peaks = [torch.linalg.vector_norm(x, math.inf, dtype=self._exact) for x in (h, delta)]
                bound += peaks[0] * peaks[1] * (delta.numel() / self.shape[0])
        return super().finite and bool(self._reduce(bound).isfinite())

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return gradients of connections that need not exist, by ascending position, averaged over processes."""
        where = csr(positions.to(self.W.device), self.shape, getattr(self.layer, "groups", 1))
        return self._gradient(where, (len(positions),))

    def free_sample(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        every = torch.arange(0, self.size, stride)
        every = every[~torch.isin(every, self.positions, assume_unique=True)]
        return self.gradient_at(every).abs()

    def steepest(self, n: int, above: float = -1.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        return masks.largest(self.free_gradients(), n, above)

    def free_gradients(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``|dP|`` of some rows at a time, computed for them alone, averaged over processes; -1: active.

        Each part is flat and comes after the position where it begins.
        """
        out, width = self.shape[0], math.prod(self.shape[1:])
        positions, ends = self.sparse.positions, self.sparse.crow.tolist()
        at_once = max(1, _CHUNK // (width * self._exact.itemsize))
        for first in range(0, out, at_once):
            last = min(first + at_once, out)
            scores = self._gradient(slice(first, last), (last - first, *self.shape[1:])).abs_().view(-1)
            scores[positions[ends[first] : ends[last]] - first * width] = -1
            yield first * width, scores

    def _gradient(self, where: CSR | slice, shape: Sequence[int]) -> Tensor:
        """Return gradients of some elements or those of some rows, which have this ``shape``."""
        total = torch.zeros(*shape, dtype=self._exact, device=self.W.device)
        for h, delta in self.calls:
            total += _gradient(self.sparse, h, delta, where)
        return self._reduce(total).to(self.W.dtype)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.W.dtype, torch.float32)

    def start(self, positions: Tensor, generator: Generator) -> None:
        """Make the layer sparse, with its own values at ``positions``; one on the meta device has them drawn."""
        assert isinstance(self.layer, (nn.Linear, nn.Conv2d))
        self._drawn = self.layer.weight.is_meta
        self.layer = make_sparse_(self.layer, positions, generator)
        self.parameter = self.layer.values
        _spare(self)

    def scale_to_fan_in_(self) -> None:
        """Multiply each neuron's values by the square root of its fan-in over what is left of it.

        Not those that were drawn for the actual fan-in.
        """
        if not self._drawn:
            fan_in = self.sparse.crow.diff()
            factor = (math.prod(self.shape[1:]) / fan_in.clamp(min=1).double()).sqrt()
            self.W.mul_(factor.repeat_interleave(fan_in, output_size=self.active))

    def exchange(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections: values, gradients and optimizer state go with them; the new ones have no such state."""
        if not (len(dropped) or len(grown)):
            return
        assert self.parameter is not None
        fresh, old = self.W.new_zeros(len(grown)), self.parameter.grad
        grown, new = grown.cpu(), fresh + value
        if (grown[1:] < grown[:-1]).any():  # seldom, and sorting takes long
            grown, order = grown.sort()
            new = new[order.to(new.device)]
        _spare(self)
        moved, positions = self._moved(dropped.cpu(), grown)
        _spare(self)
        found = self.sparse.structure_at(positions)
        del positions
        gradient = None if old is None else moved(old, self.gradient_at(grown))
        if old is not None and gradient is not None and len(old) == len(gradient):
            gradient = old.copy_(gradient)
        values = moved(self.W, new)
        for state, key in self._state_entries():
            state[key] = moved(state[key], fresh)
        self.sparse.set_structure(found, values)
        self.parameter.grad = gradient
        del found, moved, values
        _spare(self)

    def _moved(self, dropped: Tensor, grown: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Return what a vector of the values' order becomes, with elements for the grown, and the new positions."""
        held = self.positions
        staying = torch.ones(len(held), dtype=torch.bool)
        staying[torch.searchsorted(held, dropped)] = False
        before = torch.searchsorted(held, grown) - torch.searchsorted(dropped, grown)  # of those that stay
        of_grown = before.add_(torch.arange(len(grown)))
        others = torch.ones(len(held) - len(dropped) + len(grown), dtype=torch.bool)
        others[of_grown] = False
        source = torch.empty(len(others), dtype=torch.int32)  # where each comes from, of the held and the grown
        source.masked_scatter_(others, masks.positions(staying).int())
        source[of_grown] = torch.arange(len(held), len(held) + len(grown), dtype=torch.int32)
        index = torch.int32 if self.size < 2**31 else torch.int64
        both = torch.cat((held.to(index), grown.to(index)))
        del held
        positions = both.index_select(0, source)
        of_all = source.to(self.W.device)
        return lambda x, new: torch.cat((x, new.to(x))).index_select(0, of_all), positions.to(self.W.device)

    def optimizer_state(self) -> Iterator[Tensor]:  # noqa: D102  (inherited)
        for state, key in self._state_entries():
            yield state[key]

    def keep_zeros(self) -> None:
        """Do nothing: what is not active does not exist."""

    keep_zero_gradients = keep_zeros

    def listen(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make ready for calls; ``reduce`` averages over processes, and takes the loss scale away."""
        self.calls, self._reduce = [], reduce

    def detach(self) -> None:  # noqa: D102  (inherited)
        if isinstance(self.layer, SparseLayer):
            self._positions = self.positions
        self.layer = self.parameter = self.optimizer = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the module's part, which has the connections."""
        return {"shape": torch.tensor(self.shape)}

    def _state_entries(self) -> Iterator[tuple[dict[str, Any], str]]:
        assert self.optimizer is not None
        assert self.parameter is not None
        state = self.optimizer.state.get(self.parameter, {})
        for key, x in list(state.items()):
            if isinstance(x, Tensor) and x.shape == self.parameter.shape:
                yield state, key

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        positions = self._positions if self.layer is None else self.positions
        return {
            **super().__getstate__(),
            "layer": None,
            "calls": [],
            "_reduce": torch.Tensor.detach,
            "_positions": positions,
        }


class Capture(Hooks):
    """Keeps what enters sparse layers, and the gradients of what leaves them, from now on until ``close``.

    Only the calls that make up the gradients of the layers' values count: not those of validation, of backward passes
    that do not reach these, such as ``torch.autograd.grad``, or of gradients that have been set to None since.

    Args:
        weights: those of sparse layers; their ``calls`` are filled.
        reduce: makes of a gradient computed from the calls the one that the optimizer would see: averaged over
            processes, without the loss scale if a gradient scaler has taken it away.
    """

    def __init__(self, weights: Sequence[MaskedWeight], reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._weights = [weight for weight in weights if isinstance(weight, SparseWeight)]
        #: calls by weight and backward pass: passes may run within each other (reentrant checkpoints)
        self._pending: dict[str, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
        for weight in self._weights:
            weight.listen(reduce)
            hook = partial(self._called, weight)
            self._handles.append(weight.sparse.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks away and forget the calls."""
        super().close()
        self._pending = {}
        for weight in self._weights:
            weight.calls = []

    def _called(self, weight: SparseWeight, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        values = layer.values
        if not (self._open and torch.is_grad_enabled() and values.requires_grad):
            return
        if weight.name not in self._pending:  # only now: a frozen parameter takes no hooks
            self._pending[weight.name] = []
            self._handles.append(values.register_hook(partial(self._begin, weight)))
            self._handles.append(values.register_post_accumulate_grad_hook(partial(self._accept, weight)))
        h = (args[0] if args else kwargs["x"]).detach()
        output.register_hook(lambda delta: self._keep(weight, h, delta))  # type: ignore[no-untyped-call]

    def _keep(self, weight: SparseWeight, h: Tensor, delta: Tensor) -> None:
        if self._open:
            self._pending[weight.name].append((_backward_pass(), (h, delta.detach())))

    def _begin(self, weight: SparseWeight, gradient: Tensor) -> None:
        if self._open and weight.sparse.values.grad is None:  # zero_grad has thrown away what there was
            weight.calls = []

    def _accept(self, weight: SparseWeight, values: Tensor) -> None:
        if self._open:
            now, pending = _backward_pass(), self._pending[weight.name]
            weight.calls += [call for then, call in pending if then == now]
            self._pending[weight.name] = [(then, call) for then, call in pending if then != now]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": [], "_pending": {}}


def _backward_pass() -> int:
    """Return a number of the backward pass that is running, which no other has."""
    return torch._C._current_graph_task_id()


class SparseStorage(MaskedCallback):
    """What methods with a fixed budget, whose growth needs no dense tensor, have for ``storage="sparse"``.

    Args:
        args: of the next class.
        storage: ``"masked"`` or ``"sparse"``.
        plain_checkpoints: with ``storage="sparse"``, checkpoints written during a fit have the plain module's keys and
            dense weights with exact zeros; False: the nonzeros alone; None: dense up to ``DENSE_LIMIT`` bytes of them.
        options: of the next class.
    """

    #: layers exchange connections, so values change their length
    resizes: bool = False

    def __init__(
        self, *args: Any, storage: str = "masked", plain_checkpoints: bool | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        checks.one_of(STORAGES, storage=storage)
        if storage == "masked" and plain_checkpoints is not None:
            raise ValueError(
                f"plain_checkpoints is for storage='sparse', got {plain_checkpoints!r} with storage='masked', whose "
                "checkpoints are always plain. Leave it out."
            )
        self.storage = storage
        self.plain_checkpoints = plain_checkpoints
        self._plain = False
        self._backend: str | None = None

    @property
    def surplus(self) -> int:
        """Number of connections that the layers have above the budget for now."""
        return 0

    # ------------------------------------------------------------------ the exchange of layers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the layers exchanged as soon as the module is whole, and checkpoints loaded into what is there."""
        super().setup(trainer, pl_module, stage)
        if self.storage == "sparse":
            for weight in self._weights.values():
                weight.detach()  # of a fit that an exception has ended
            if stage == "fit":
                self._refuse_averages(trainer)
                self._backend = None
                exchange = partial(self._make_sparse, trainer, pl_module)
                self._handles.append(_After(pl_module, "configure_model", exchange))
                self._handles.append(_After(pl_module, "on_load_checkpoint", self._take_checkpoint))
            else:
                hook = partial(_load_hook, pl_module)
                self._handles.append(pl_module._register_load_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]

    def _refuse_averages(self, trainer: Trainer) -> None:
        """Raise if another callback averages weights over time: values whose places differ would be mixed."""
        kinds = {"StochasticWeightAveraging", "WeightAveraging"}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if kinds & {base.__name__ for base in type(other).__mro__}:
                raise MisconfigurationException(
                    f"{type(self).__name__}(storage='sparse') holds values whose places change, which "
                    f"{type(other).__name__} would average as if they did not. Use storage='masked', or leave it out."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights and the module's own methods behind, also of a fit that has not come to its start."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back((_After, Ignored))

    def _give_back(self, kinds: tuple[type[Any], ...]) -> None:
        for handle in self._handles:
            if isinstance(handle, kinds):
                handle.remove()

    @torch.no_grad()
    def _make_sparse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the connections, or take those of an earlier fit of the same weights, and exchange the layers."""
        choices = [choice for choice in choose(pl_module, self.include, self.exclude) if choice.reason is None]
        if choices and all(choice.sparse is not None for choice in choices):
            # an earlier fit left them so; attach looks whether they are what was asked for
            self._hold(
                [SparseWeight(choice.name, choice.shape, choice.sparse) for choice in choices], trainer, pl_module
            )
            return
        self._refuse_layers(pl_module, choices)
        earlier, weights = self._weights, []
        for choice in choices:
            layer = pl_module.get_submodule(_prefix(choice.name))
            weights.append(SparseWeight(choice.name, choice.shape, layer))
        with torch.device("cpu"):  # where draws are made, whatever the device that configure_model builds on
            if _continues(weights, earlier):
                for weight in weights:
                    weight.start(earlier[weight.name].positions, self.generator)
            else:
                if earlier:
                    rank_zero_warn(
                        f"This {type(self).__name__} holds the state of an earlier fit of other weights: it starts "
                        "afresh."
                    )
                self.run_seed = trainer.strategy.broadcast(torch.initial_seed())
                self.generator.manual_seed(self.run_seed if self.seed is None else self.seed)
                self.initial_masks(weights)
        self._hold(weights, trainer, pl_module)

    def _hold(self, weights: Sequence[SparseWeight], trainer: Trainer, module: LightningModule) -> None:
        """Take the weights of layers that are sparse now, and say what checkpoints and DDP do with them."""
        self._weights = {weight.name: weight for weight in weights}
        size = sum(weight.size * weight.W.element_size() for weight in weights)
        self._plain = size <= DENSE_LIMIT if self.plain_checkpoints is None else self.plain_checkpoints
        for weight in weights:
            weight.sparse.plain = self._plain
        # all processes make the same indices; values that change their length are averaged in on_after_backward
        names = (*_INDICES, "values") if self.resizes else _INDICES
        ignored = Ignored(module, [f"{_prefix(weight.name)}.{name}" for weight in weights for name in names])
        self._handles.append(ignored)
        if self.resizes and isinstance(trainer.strategy, DDPStrategy):
            ignored.refuse_nothing_left()

    def _refuse_layers(self, module: nn.Module, choices: Sequence[Choice]) -> None:
        """Raise if a weight is not that of a plain linear layer or 2-d convolution alone."""
        problems = []
        for choice in choices:
            prefix, _, local = choice.name.rpartition(".")
            owner = module.get_submodule(prefix)
            if type(owner) not in (nn.Linear, nn.Conv2d) or local != "weight":
                problems.append(f"{choice.name} ({choice.layer})")
            elif "tied" in choice.layer:
                problems.append(f"{choice.name} ({choice.layer}: a sparse layer cannot share its weight)")
        if problems:
            raise MisconfigurationException(
                f"{type(self).__name__}(storage='sparse') can exchange plain nn.Linear and nn.Conv2d layers only, not "
                f"{', '.join(problems)}. Leave them dense with exclude=[...], or use storage='masked'."
            )

    def to_dense(self, module: nn.Module) -> nn.Module:
        """Turn the sparse layers of ``module`` into dense ones, in place; done at the end of a fit if there is room."""
        return to_dense(module)

    # ------------------------------------------------------------------ several processes

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have all processes begin with the same layers, and choose who multiplies."""
        self._give_back((_After,))  # no checkpoint was to be loaded
        if self.storage == "sparse" and trainer.world_size > 1:
            layers = [weight.layer for weight in self._weights.values() if isinstance(weight, SparseWeight)]
            copy_from_first([layer for layer in layers if isinstance(layer, SparseLayer)])  # none of a checkpoint's
        super().on_fit_start(trainer, pl_module)
        if self.storage == "sparse":
            self._choose_backend(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients that DDP leaves alone, whenever DDP has averaged the others."""
        super().on_after_backward(trainer, pl_module)
        model: Any = trainer.strategy.model
        if self.storage == "sparse" and self.resizes and getattr(model, "require_backward_grad_sync", False):
            parameters = [weight.parameter for weight in self._weights.values() if weight.parameter is not None]
            average_gradients(parameters, model.process_group)

    # ------------------------------------------------------------------ verbs

    def attach(self, choices: Sequence[Choice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        if self.storage == "masked":
            super().attach(choices, optimizers, resumed)
            return
        here = {choice.name: choice.shape for choice in choices}
        held = {name: weight.shape for name, weight in self._weights.items()}
        if resumed and held:  # none in a checkpoint of before the fit
            refuse_other_weights(self, here, held)
        elif here.keys() < held.keys():
            raise MisconfigurationException(
                f"No optimizer owns {sorted(held.keys() - here.keys())}, which {type(self).__name__} has made sparse. "
                "Leave them out with exclude, or return them from configure_optimizers."
            )
        else:
            self._epoch, self._clocks = 0, []
        self._weights = {choice.name: SparseWeight(choice.name, choice.shape, choice.sparse) for choice in choices}
        self._pools = {id(optimizer): Pool() for optimizer in optimizers}
        for optimizer in optimizers:
            self._join(optimizer, self._weights)
        self._set_clocks()
        weights = self._weights.values()
        active = sum(weight.active for weight in weights)
        asked = budget(self.sparsity_target, sum(weight.size for weight in weights)) + self.surplus
        if active != asked:
            raise MisconfigurationException(
                f"The module's sparse layers have {active} connections, sparsity={self.sparsity_target!r} asks for "
                f"{asked}. Give the sparsity they were made with, or make them dense with "
                "lightning_sparse.storage.to_dense(module) to start afresh."
            )

    def _move(self, weights: Sequence[MaskedWeight], pool: Pool, scale: float) -> bool:
        if self.storage == "sparse":
            _spare(*weights)  # what training steps have left
        return super()._move(weights, pool, scale)

    def _choose_backend(self, trainer: Trainer) -> None:
        """Multiply as is quickest for the largest layer, or as the checkpoint says; tell, and warn if it is slow."""
        largest = max(self._weights.values(), key=lambda weight: weight.size)
        assert isinstance(largest, SparseWeight)
        seconds = trainer.strategy.broadcast(measure(largest.sparse) if trainer.is_global_zero else {})
        names = [name for name in seconds if name != DENSE]
        if self._backend is not None and self._backend not in names:
            rank_zero_warn(
                f"The checkpoint was trained with the backend {self._backend!r}, which is not available here "
                f"({', '.join(names)}): the run continues, but not to the last bit as it would have."
            )
        if self._backend not in names:
            fixed = torch.are_deterministic_algorithms_enabled()
            self._backend = names[0] if fixed else min(names, key=lambda name: seconds[name])
        for weight in self._weights.values():
            assert isinstance(weight, SparseWeight)
            weight.sparse.backend = self._backend
        ratios = {name: seconds[name] / seconds[DENSE] for name in names}
        others = "".join(f", {name} {ratio:.2g} x" for name, ratio in ratios.items() if name != self._backend)
        told = (
            f"{largest.name}, of density {largest.active / largest.size:.3g}, takes about {ratios[self._backend]:.2g} "
            f"x a dense layer's time with {self._backend}{others}"
        )
        rank_zero_info(f"storage='sparse': {told}.")
        if ratios[self._backend] > 1:
            rank_zero_warn(f"storage='sparse' is slower here than storage='masked', which takes more memory: {told}.")

    def attach_more(self, choices: Sequence[Choice], optimizer: Optimizer) -> None:  # noqa: D102
        if self.storage == "masked":
            super().attach_more(choices, optimizer)
            return
        raise MisconfigurationException(
            f"{type(self).__name__}(storage='sparse') exchanges layers before the optimizer is made, so "
            f"{', '.join(choice.name for choice in choices)} cannot join later. Leave them out with exclude."
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module, and make it dense if that takes no more than ``DENSE_LIMIT`` bytes."""
        weights = list(self._weights.values())
        ours = self.storage == "sparse" and stage == "fit" and all(weight.parameter is not None for weight in weights)
        size = sum(weight.size * weight.W.element_size() for weight in weights) if ours else 0
        layers = [weight.layer for weight in weights if isinstance(weight, SparseWeight)]  # others may be another's
        super().teardown(trainer, pl_module, stage)
        if self.storage == "sparse" and stage != "fit":
            self._release()
        if ours and size <= DENSE_LIMIT:
            for layer in layers:
                assert isinstance(layer, SparseLayer)
                make_dense_(layer)
        elif ours:
            rank_zero_info(
                f"The module keeps its sparse layers: dense weights would take {size / 1e9:.1f} GB. "
                f"{type(self).__name__}.to_dense(module) makes them."
            )

    # ------------------------------------------------------------------ state

    def loaded_weight(self, name: str, state: dict[str, Any]) -> MaskedWeight:
        """Return a weight with the state of a checkpoint."""
        if ("shape" in state) != (self.storage == "sparse"):
            raise MisconfigurationException(
                f"The checkpoint was written with another storage than {self.storage!r}, which this "
                f"{type(self).__name__} has: give it the same."
            )
        if self.storage == "masked":
            return super().loaded_weight(name, state)
        held = self._weights.get(name)  # exchanged for this fit, of which a tuner has tried some steps
        return SparseWeight(name, state["shape"].tolist(), held.layer if isinstance(held, SparseWeight) else None)

    def state_dict(self) -> dict[str, Any]:
        """Add who multiplies and, where the module's part has dense weights, the connections: some may be 0."""
        state = super().state_dict()
        if self.storage == "sparse":
            state["backend"] = self._backend or ""
            for name, weight in self._weights.items() if self._plain else ():
                index = torch.int32 if weight.size < 2**31 else torch.int64
                state["weights"][name]["positions"] = weight.positions.to(index)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; the connections are in the module."""
        if self.storage == "sparse" and self._module is not None:
            raise MisconfigurationException(
                f"{type(self).__name__}(storage='sparse') cannot take up a state after a fit has started. Use a "
                "strategy that loads checkpoints before setup, and Lightning's tuners when the fit starts."
            )
        super().load_state_dict(state_dict)
        self._backend = state_dict.get("backend") or None

    def _take_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have the dense weights of a checkpoint loaded by sparse layers."""
        weights = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("weights", {})
        for name, weight in self._weights.items():
            positions = weights.get(name, {}).get("positions")
            if positions is not None and name in checkpoint["state_dict"] and isinstance(weight, SparseWeight):
                make_state_sparse(checkpoint["state_dict"], _prefix(name), weight.sparse, positions.long())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the nonzeros alone, if that is what checkpoints hold, also after the fit, when the module is dense."""
        if self.storage == "sparse" and self._module is None and not self._plain:
            state = checkpoint["state_dict"]
            for name, weight in self._weights.items():
                if name in state:
                    prefix = _prefix(name)
                    groups = getattr(pl_module.get_submodule(prefix), "groups", 1)
                    state.update(sparse_entries(prefix, state.pop(name), weight.positions, groups))


class _After:
    """Calls ``function``, with the same arguments, once, when the Trainer has called the module's ``method``."""

    def __init__(self, module: LightningModule, method: str, function: Callable[..., None]) -> None:
        own = getattr(module, method)

        def hook(*args: Any) -> None:
            self.remove()
            own(*args)
            function(*args)

        self._module, self._method, self._hook = module, method, hook
        setattr(module, method, hook)

    def remove(self) -> None:
        """Give the module its own method back."""
        if vars(self._module).get(self._method) is self._hook:
            delattr(self._module, self._method)


def _load_hook(module: nn.Module, state_dict: dict[str, Any], *rest: Any) -> None:
    """Let any layers load any checkpoint's."""
    load_for(module, state_dict)


def _prefix(name: str) -> str:
    return name.rpartition(".")[0]


def _continues(weights: Sequence[SparseWeight], earlier: Mapping[str, MaskedWeight]) -> bool:
    """Tell whether the dense weights are 0 wherever an earlier fit left them inactive."""
    if {weight.name: weight.shape for weight in weights} != {name: w.shape for name, w in earlier.items()}:
        return False
    if any(isinstance(weight, SparseWeight) and not weight.known for weight in earlier.values()):
        return False
    for weight in weights:
        assert isinstance(weight.layer, (nn.Linear, nn.Conv2d))
        W = weight.layer.weight
        if W.is_meta or W.count_nonzero() != W.reshape(-1)[earlier[weight.name].positions.to(W.device)].count_nonzero():
            return False
    return True


def _spare(*weights: MaskedWeight) -> None:
    """Give freed memory back if there can be much."""
    if any(weight.active >= _SPARED_FROM and weight.W.is_cpu for weight in weights):
        give_back()


def _gradient(layer: SparseLayer, h: Tensor, delta: Tensor, where: CSR | slice) -> Tensor:
    """Return the gradients of some elements of the weight, or of some rows."""
    if isinstance(layer, SparseLinear):
        if isinstance(where, slice):
            return functional.linear_gradient_rows(h, delta, where)
        return functional.linear_gradient(h, delta, where, layer.backend)
    conv: Any = layer
    x, delta = (h, delta) if h.ndim == 4 else (h.unsqueeze(0), delta.unsqueeze(0))
    x, geometry = functional.padded(conv, x)
    if isinstance(where, slice):
        return functional.conv2d_gradient_rows(x, delta, where, conv.shape, geometry, conv.groups)
    return functional.conv2d_gradient(x, delta, where, geometry, conv.backend)
