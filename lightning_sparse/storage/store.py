"""Store: where the weights of one method are kept; methods and families never ask which store they have."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_sparse.compat.lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_sparse.compat.torch_private import register_before_load
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.storage.checkpoint import load_for
from lightning_sparse.storage.optimizers import carry_over
from lightning_sparse.trainer.adopt import Adoption
from lightning_sparse.trainer.after import After
from lightning_sparse.trainer.readouts import Readouts
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroups

__all__ = ["Storage", "Store", "Stored"]

Storage = Literal["masked", "sparse", "block"]


class Store(ABC):
    """What every store does, and when; this one does nothing but say so.

    Args:
        method: whose weights are kept.
    """

    name: Storage
    #: of a weight that is divided over processes, each can keep its part
    keeps_parts = False

    def __init__(self, method: "Stored") -> None:
        self.method = method
        self._from_other = False  # the checkpoint was written with the other storage

    # ------------------------------------------------------------------ a fit begins and ends

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Get ready before the module is configured and a checkpoint is loaded."""
        self._from_other = False
        handles = self.method._fit.handles
        handles.append(After(module, "on_load_checkpoint", self._take_checkpoint))
        if stage != "fit":  # layers may be of either kind
            handles.append(register_before_load(module, lambda state_dict, *_: load_for(module, state_dict)))

    def begin_fit(self, trainer: Trainer) -> None:
        """See that a fit begins; its weights have not been chosen yet."""
        self.method._fit.remove(After)  # no checkpoint was to be loaded

    def begin_training(self, trainer: Trainer) -> None:
        """See that the weights have been taken over; optimizers load their states after that."""
        for optimizer in trainer.optimizers if self._from_other else ():
            hook = partial(carry_over, [*self.method._weights.values()], self.carried)
            self.method._fit.handles.append(optimizer.register_load_state_dict_pre_hook(hook))

    def abort(self) -> None:
        """Leave nothing behind in the module after an exception."""
        self.method._fit.remove(After)

    def end(self, stage: str) -> Callable[[], None]:
        """Return what is left to do when the method has let go of its weights."""
        return _nothing

    # ------------------------------------------------------------------ weights

    @abstractmethod
    def holds(self, choice: ParameterChoice) -> bool:
        """Tell whether a parameter is held as this store holds weights."""

    def refuse(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise unless all the weights are held as this store does."""
        for choice in choices:
            if not self.holds(choice):
                raise MisconfigurationException(
                    f"{choice.name} is {'' if choice.sparse is not None else 'not '}held by a sparse layer, but "
                    f"{self.method!r} trains with storage={self.name!r}. Leave it out with exclude, or make "
                    "sparse layers dense with lightning_sparse.storage.to_dense(module)."
                )

    @abstractmethod
    def adopt(
        self, choices: Sequence[ParameterChoice], held: Mapping[str, Weight], resumed: bool
    ) -> tuple[Adoption, dict[str, Weight]]:
        """Return how the fit begins, and its weights.

        Args:
            choices: all of them selected and owned by an optimizer.
            held: what the method has of a checkpoint or an earlier fit.
            resumed: it is a checkpoint's.
        """

    @abstractmethod
    def add(self, choices: Sequence[ParameterChoice]) -> dict[str, Weight]:
        """Return weights that join a fit, all active."""

    # ------------------------------------------------------------------ steps

    def begin_batch(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """See a training batch that is about to be computed with."""

    def end_batch(self, trainer: Trainer) -> None:
        """See the end of a training batch."""

    def after_backward(self, trainer: Trainer) -> None:
        """Complete the gradients of a micro-batch."""

    def watch(self, weights: Sequence[Weight], reduce: Callable[[Tensor], Tensor]) -> list[Hooks]:
        """Return what listens to layers so that gradients of inactive connections can be told; ``close`` ends it.

        Args:
            weights: whose connections are about to be moved.
            reduce: makes of a gradient with the loss scale, of this process, one as the parameters have it.
        """
        return []

    def before_move(self, weights: Sequence[Weight]) -> None:
        """Make room for moving connections."""

    # ------------------------------------------------------------------ state

    @abstractmethod
    def wrote(self, state: Mapping[str, Any]) -> bool:
        """Tell whether a weight's state in a checkpoint is one that this store writes."""

    def load_weight(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        """Return a weight with the state of a checkpoint."""
        if not self.wrote(state):
            raise MisconfigurationException(
                f"The checkpoint was written with another storage than {self.name!r}, which this "
                f"{self.method!r} has: give it the same."
            )
        return self._load(name, state, held)

    @abstractmethod
    def _load(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        """Return a weight with a state that this store has written."""

    @abstractmethod
    def restore(self, weight: Weight, saved: Weight) -> None:
        """Give a weight in use the state of a loaded one; raise if that cannot be, now that the fit has started."""

    def _take_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint one of this store's, in place, before the module loads its part."""
        states = checkpoint.get("callbacks", {}).get(self.method.state_key, {}).get("weights", {})
        self._from_other = self.take(states, checkpoint["state_dict"])

    @abstractmethod
    def take(self, states: dict[str, Any], module: dict[str, Any]) -> bool:
        """Make a checkpoint one of this store's, in place, and tell whether another store has written it.

        Args:
            states: of the weights, by name.
            module: its ``state_dict``.
        """

    @abstractmethod
    def carried(self, weight: Weight, x: Tensor) -> Tensor | None:
        """Return what a tensor of an optimizer's state becomes that the other store's weight had; None: nothing."""

    def state_dict(self, weights: Mapping[str, Weight]) -> dict[str, Any]:
        """Return what a checkpoint keeps: the weights' state, and the store's own."""
        return {"weights": {name: weight.state() for name, weight in weights.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the store's own state."""

    def on_save_checkpoint(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the module's part of a checkpoint."""


class Stored(Readouts, Verbs, Callback, ABC):
    """A method whose weights a store keeps: it passes Lightning's hooks on to the store.

    Attributes:
        store: where the weights are kept.
    """

    store: "Store"
    _weights: dict[str, Weight]
    _groups: WeightGroups
    include: Sequence[str] | None
    exclude: Sequence[str]
    plain_checkpoints: bool | None
    pattern: Pattern
    pattern_name: str

    #: layers pass connections on to each other, so their values change their length
    resizes: bool = False

    @property
    def surplus(self) -> int:
        """Number of connections that the layers have above the budget for now."""
        return 0

    @abstractmethod
    def draw(self, weights: Sequence[Weight], run_seed: int) -> None:
        """Give weights their first connections, from the beginning of the method's random numbers."""

    @abstractmethod
    def refuse_number(self, weights: Sequence[Weight]) -> None:
        """Raise unless a fit may begin with as many connections as the weights have."""

    @abstractmethod
    def refuse_made_sparse(self, names: Sequence[str]) -> None:
        """Raise if a first fit cannot take the connections of layers that are sparse already, with these weights."""

    def continues(self, active: int, nonzero: int) -> bool:
        """Tell whether a second fit goes on with the connections of the first, outside of which all weights are 0.

        Args:
            active: number of connections.
            nonzero: number of those that are not 0.
        """
        return True

    # ------------------------------------------------------------------ what users read

    @property
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is active: a boolean tensor of the weight's shape, by parameter name.

        Of a weight that is divided over processes it is a DTensor: ``full_tensor()``, called on all, returns the whole.
        """
        return {name: self.mask(name) for name in self._weights}

    def mask(self, name: str) -> Tensor:
        """Return one of ``masks``, without making the others."""
        weight = self._weights[name]
        return weight.part.joined(weight.mask)

    @property
    def layer_count(self) -> dict[str, int]:
        """Number of active connections of each layer, by parameter name."""
        return {name: weight.num_active for name, weight in self._weights.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: all where each step uses it of all, else the active."""
        return dict.fromkeys(self._weights, 1.0) if self.needs_whole_gradients else self.layer_density

    @property
    def mask_versions(self) -> dict[str, int]:
        """A number for each weight, another one whenever its mask has changed."""
        return {name: weight.mask_version for name, weight in self._weights.items()}

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get ready before the module is configured and a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        self._groups.end()  # of a fit that an exception has ended
        self.store.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over."""
        self.store.begin_fit(trainer)
        super().on_fit_start(trainer, pl_module)
        self.store.begin_training(trainer)

    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise unless all the weights are held as the store does."""
        self.store.refuse(choices)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the store see the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.store.begin_batch(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the store see the end of the batch, before a checkpoint is written."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.store.end_batch(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the gradients of a micro-batch."""
        super().on_after_backward(trainer, pl_module)
        self.store.after_backward(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the store have its say in what a checkpoint holds of the module."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.store.on_save_checkpoint(pl_module, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights behind, and the module as it was."""
        self.store.abort()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        finish = self.store.end(stage)
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._groups.end()
            for weight in self._weights.values():
                weight.detach()
        finish()


def _nothing() -> None:
    pass
