"""``storage="sparse"``: a method's weights as layers that hold their nonzeros alone, from before the optimizer is made.

The layers are exchanged after ``configure_model``: the module is whole by then, and neither its checkpoint has been
loaded nor its optimizer been made. Then a weight's only parameter is the vector of its values, so gradients, optimizer
state and what processes average have that size, too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import (
    DDPStrategy,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.layers.selection import ParameterChoice, select_parameters
from lightning_sparse.layers.sparse import SparseLayer, make_dense_, to_dense
from lightning_sparse.rules.budgets import budget
from lightning_sparse.storage.checkpoint import load_for, make_state_sparse, sparse_entries
from lightning_sparse.storage.measure import DENSE, measure
from lightning_sparse.storage.processes import Ignored, average_gradients, copy_from_first
from lightning_sparse.trainer.callback import Storage, averaging, refuse_other_weights
from lightning_sparse.weights.base import Pool, Weight
from lightning_sparse.weights.sparse import SparseWeight, spare

__all__ = ["DENSE_LIMIT", "SparseStorage"]

#: bytes of dense weights up to which checkpoints hold them, and a module is made dense again when the fit ends
DENSE_LIMIT = 2 << 30

_INDICES = ("crow", "col", "weight_shape", "transposed_crow", "transposed_col", "permutation")


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
        self, *args: Any, storage: Storage = "masked", plain_checkpoints: bool | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        checks.one_of(get_args(Storage), storage=storage)
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
        for other in averaging(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__}(storage='sparse') holds values whose places change, which {other} would "
                "average as if they did not. Use storage='masked', or leave it out."
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
        choices = [
            choice for choice in select_parameters(pl_module, self.include, self.exclude) if choice.reason is None
        ]
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
                    self._warn_of_other_weights()
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

    def _refuse_layers(self, module: nn.Module, choices: Sequence[ParameterChoice]) -> None:
        """Raise if a weight is not that of a plain linear layer or 2-d convolution alone."""
        problems = []
        for choice in choices:
            prefix, _, local = choice.name.rpartition(".")
            owner = module.get_submodule(prefix)
            if type(owner) not in (nn.Linear, nn.Conv2d) or local != "weight":
                problems.append(f"{choice.name} ({choice.layer})")
            elif choice.tied:
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

    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
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

    def _move(self, weights: Sequence[Weight], pool: Pool, scale: float) -> bool:
        if self.storage == "sparse":
            spare(*weights)  # what training steps have left
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

    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
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

    def loaded_weight(self, name: str, state: dict[str, Any]) -> Weight:
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


def _continues(weights: Sequence[SparseWeight], earlier: Mapping[str, Weight]) -> bool:
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
