"""SparseStore: a method's weights as layers that hold their nonzeros alone, from before the optimizer is made.

The layers are exchanged after ``configure_model``: the module is whole by then, and neither its checkpoint has been
loaded nor its optimizer been made. Then a weight's only parameter is the vector of its values, so gradients, optimizer
state and what processes average have that size, too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_sparse.compat.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    rank_zero_info,
)
from lightning_sparse.compat.optimizers import takes_matrices_alone
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.layers.sparse import SparseLayer, make_dense_
from lightning_sparse.layers.stand_in import shaped
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.rules import select
from lightning_sparse.storage.checkpoint import make_state_sparse, sparse_entries
from lightning_sparse.storage.compare import COMPARED_LIMIT, refuse_difference
from lightning_sparse.storage.exchange import exchange_layers, prefix
from lightning_sparse.storage.layer_backends import LayerBackends
from lightning_sparse.storage.processes import Ignored, average_gradients, copy_from_first
from lightning_sparse.storage.store import Storage, Store, Stored
from lightning_sparse.trainer.adopt import Adoption
from lightning_sparse.trainer.after import After
from lightning_sparse.trainer.agreement import refuse_broken_positions
from lightning_sparse.trainer.guards import averaging, listed, refuse_other_weights
from lightning_sparse.trainer.ownership import owned
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.captured import Capture
from lightning_sparse.weights.sparse import SparseWeight, trim_after

__all__ = ["DENSE_LIMIT", "SparseStore"]

#: bytes of dense weights up to which they are made, little beside what torch takes: for checkpoints, to compare with
#: the dense module, at the fit's end
DENSE_LIMIT = 64 << 20


class SparseStore(Store):
    """Layers that hold the nonzeros alone, for methods whose growth needs no dense tensor."""

    name: Storage = "sparse"

    #: types of the layers that it exchanges, exactly these
    exchanged: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)

    def __init__(self, method: Stored) -> None:
        super().__init__(method)
        self._plain = False  # checkpoints have dense weights
        self.backends = LayerBackends()
        self._compared = False  # with the dense module, in this fit

    @property
    def _weights(self) -> list[SparseWeight]:
        weights = list(self.method._weights.values())
        return [weight for weight in weights if isinstance(weight, SparseWeight)]

    def weight(self, name: str, shape: Sequence[int], layer: nn.Module | None) -> SparseWeight:
        """Return a weight of a layer, sparse or about to be made so; None: its layer is not known."""
        return SparseWeight(name, shape, layer)

    # ------------------------------------------------------------------ the exchange of layers

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Have the layers exchanged as soon as the module is whole, and checkpoints loaded into what is there."""
        for weight in self._weights:
            weight.detach()  # of a fit that an exception has ended
        super().setup(trainer, module, stage)
        if stage != "fit":
            return
        handles = self.method._fit.handles
        _refuse_averages(self.method, trainer)
        self.backends, self._compared = LayerBackends(), False
        handles.append(After(module, "configure_model", partial(self._exchange, trainer, module)))
        # code that divides parameters by their dimensions finds those of the dense weights
        dense_shapes = partial(_dense_shapes, self)
        handles.append(After(module, "configure_optimizers", during=dense_shapes))

    def abort(self) -> None:
        """Leave the module's own methods behind, also of a fit that has not come to its start."""
        super().abort()
        self.method._fit.remove(Ignored)

    def _exchange(self, trainer: Trainer, module: LightningModule) -> None:
        """Exchange the layers, take their weights, and say what checkpoints and DDP do with them."""
        weights = exchange_layers(self, trainer, module)
        self.method._weights = {weight.name: weight for weight in weights}
        plain = self.method.plain_checkpoints
        self._plain = _dense_bytes(weights) <= DENSE_LIMIT if plain is None else plain
        for weight in weights:
            weight.sparse.plain = self._plain
        # all processes make the same indices; values that change their length are averaged in after_backward
        more = ("weight",) if self.method.resizes else ()
        names = [(weight, (*weight.sparse.indices, "weight_shape", *more)) for weight in weights]
        ignored = Ignored(module, [f"{prefix(weight.name)}.{name}" for weight, own in names for name in own])
        self.method._fit.handles.append(ignored)
        if self.method.resizes and is_a(trainer.strategy, "DDPStrategy"):
            ignored.refuse_nothing_left()

    # ------------------------------------------------------------------ a fit begins and ends

    def holds(self, choice: ParameterChoice) -> bool:
        """Tell whether the layer holds its nonzeros one by one."""
        return choice.sparse is not None and choice.sparse.block == (1, 1)

    def begin_fit(self, trainer: Trainer) -> None:
        """Have all processes begin with the same layers."""
        super().begin_fit(trainer)
        _refuse_matrix_optimizers(self.method, trainer)
        if trainer.world_size > 1:
            layers = [weight.layer for weight in self._weights]
            copy_from_first([layer for layer in layers if isinstance(layer, SparseLayer)])  # none of a checkpoint's

    def adopt(
        self, choices: Sequence[ParameterChoice], held: Mapping[str, Weight], resumed: bool
    ) -> tuple[Adoption, dict[str, Weight]]:
        """Return the weights of the layers, whose connections have been drawn or loaded."""
        here = {choice.name: choice.shape for choice in choices}
        shapes = {name: weight.shape for name, weight in held.items()}
        of_checkpoint = resumed and bool(held)  # none in a checkpoint of before the fit
        if of_checkpoint:
            refuse_other_weights(self.method, here, shapes)
        elif here.keys() < shapes.keys():
            raise MisconfigurationException(
                f"No optimizer owns {sorted(shapes.keys() - here.keys())}, which {self.method!r} has made sparse. "
                "Leave them out with exclude, or return them from configure_optimizers."
            )
        weights: dict[str, Weight] = {c.name: self.weight(c.name, c.shape, c.sparse) for c in choices}
        self.method.refuse_number([*weights.values()])
        return "resumed" if of_checkpoint else "continued", weights

    def add(self, choices: Sequence[ParameterChoice]) -> dict[str, Weight]:
        """Refuse: the optimizer knows the layers as they are."""
        raise MisconfigurationException(
            f"{self.method!r} exchanges layers before the optimizer is made, so "
            f"{', '.join(choice.name for choice in choices)} cannot join later. Leave them out with exclude."
        )

    def begin_training(self, trainer: Trainer) -> None:
        """Multiply as the checkpoint says, or as is asked for; the first batch chooses for the other layers."""
        super().begin_training(trainer)
        self.backends.settle(self._weights)

    def end(self, stage: str) -> Callable[[], None]:
        """Return what makes the module dense, if that takes no more than ``DENSE_LIMIT`` bytes."""
        weights = self._weights
        if stage != "fit" or any(weight.parameter is None for weight in weights):
            return super().end(stage)
        layers, size = [weight.sparse for weight in weights], _dense_bytes(weights)  # later they may be another's

        def make_dense() -> None:
            for layer in layers if size <= DENSE_LIMIT else ():
                layer.values.grad = None
                make_dense_(layer)
            if size > DENSE_LIMIT:
                rank_zero_info(
                    f"The module keeps its sparse layers: dense weights would take {size / 1e9:.1f} GB. "
                    "lightning_sparse.storage.to_dense(module) makes them."
                )

        return make_dense

    # ------------------------------------------------------------------ steps

    def begin_batch(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """Compare the module with the dense one on the first batch, if both are small enough; note what layers get."""
        if not self._compared:
            self._compared = True
            if _is_small(module, self._weights):
                refuse_difference(self.method, trainer, module, batch, index)
        if not self.backends.known and self.backends.inputs is None:
            self.method._fit.handles.append(self.backends.note_inputs(self._weights))

    def end_batch(self, trainer: Trainer) -> None:
        """Choose how the layers of the first batch compute most quickly."""
        if self.backends.inputs is not None:
            self.backends.measure(self._weights, trainer, self.name)

    def after_backward(self, trainer: Trainer) -> None:
        """Average the gradients that DDP leaves alone, whenever DDP has averaged the others."""
        model: Any = trainer.strategy.model
        if self.method.resizes and getattr(model, "require_backward_grad_sync", False):
            parameters = [weight.parameter for weight in self._weights if weight.parameter is not None]
            average_gradients(parameters, model.process_group)

    def watch(self, weights: Sequence[Weight], reduce: Callable[[Tensor], Tensor]) -> list[Hooks]:
        """Listen to the calls of the layers, which gradients are computed from."""
        sparse = {weight.name: weight for weight in weights if isinstance(weight, SparseWeight)}
        layers = {name: weight.sparse for name, weight in sparse.items()}
        capture = Capture(layers, {name: weight.gradient for name, weight in sparse.items()}, reduce)
        trim_after(*weights)  # what earlier steps have left, for what will be kept
        return [capture]

    def before_move(self, weights: Sequence[Weight]) -> None:
        """Give back what training steps have left."""
        trim_after(*weights)

    # ------------------------------------------------------------------ state

    def wrote(self, state: Mapping[str, Any]) -> bool:  # noqa: D102  (inherited)
        return "shape" in state

    def _load(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        exchanged = held.get(name)  # for this fit, of which a tuner has tried some steps
        layer = exchanged.layer if isinstance(exchanged, SparseWeight) else None
        return self.weight(name, state["shape"].tolist(), layer)

    def restore(self, weight: Weight, saved: Weight) -> None:
        """Raise: the connections are in the module's part of a checkpoint."""
        raise MisconfigurationException(
            f"{self.method!r} cannot take up a state after a fit has started. Use a "
            "strategy that loads checkpoints before setup, and Lightning's tuners when the fit starts."
        )

    def state_dict(self, weights: Mapping[str, Weight]) -> dict[str, Any]:
        """Add who multiplies and, where the module's part has dense weights, the connections: some may be 0."""
        state = super().state_dict(weights)
        state |= self.backends.state_dict()
        for name, weight in weights.items() if self._plain else ():
            index = torch.int32 if weight.size < 2**31 else torch.int64
            state["weights"][name]["positions"] = weight.active_indices.cpu().to(index)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up who multiplies."""
        self.backends.load_state_dict(state_dict)

    def take(self, states: dict[str, Any], module: dict[str, Any]) -> bool:
        """Have the dense weights of a checkpoint loaded by sparse layers."""
        masks = {name: states[name]["mask"] for name in states if "mask" in states[name]}
        states.update({name: {"shape": torch.tensor(mask.shape)} for name, mask in masks.items()})
        for weight in self._weights:
            positions = states.get(weight.name, {}).get("positions")
            if positions is not None:
                refuse_broken_positions(weight.name, positions, weight.size)
            if weight.name in masks:
                positions = select.positions(masks[weight.name].bool())
            if positions is not None and weight.name in module and weight.layer is not None:
                make_state_sparse(module, prefix(weight.name), weight.sparse, positions.long())
        return bool(masks)

    def carried(self, weight: Weight, x: Tensor) -> Tensor | None:
        """Return a dense tensor's elements at the connections."""
        return x.reshape(-1)[weight.active_indices.to(x.device)] if tuple(x.shape) == weight.shape else None

    def on_save_checkpoint(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the nonzeros alone, if that is what checkpoints hold, also after the fit, when the module is dense.

        What steps have left is given back before: Lightning writes checkpoints into memory first.
        """
        trim_after(*self._weights)
        if self.method._fit.module is None and not self._plain:
            state = checkpoint["state_dict"]
            for weight in self._weights:
                if weight.name in state:
                    layer = prefix(weight.name)
                    groups = getattr(module.get_submodule(layer), "groups", 1)
                    state.update(sparse_entries(layer, state.pop(weight.name), weight.active_indices, groups))


def _refuse_averages(method: Stored, trainer: Trainer) -> None:
    """Raise if another callback averages weights over time: values whose places differ would be mixed."""
    for other in averaging(trainer):
        raise MisconfigurationException(
            f"{method!r} holds values whose places change, which {type(other).__name__} would "
            "average as if they did not. Use storage='masked', or leave it out."
        )


def _refuse_matrix_optimizers(method: Stored, trainer: Trainer) -> None:
    """Raise if an optimizer multiplies matrices, which vectors of nonzeros are not."""
    ours = {id(weight.parameter): name for name, weight in method._weights.items()}
    for optimizer in trainer.optimizers:
        names = [ours[i] for i in owned(optimizer) if i in ours]
        if names and takes_matrices_alone(optimizer):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} trains matrices, but {method!r} holds {listed(sorted(names))} as vectors "
                "of nonzeros. Give them to another optimizer such as AdamW, or use storage='masked'."
            )


def _dense_shapes(store: SparseStore) -> AbstractContextManager[None]:
    """Give the layers' values, for a while, the shapes of the dense weights."""
    return shaped((weight.sparse.values, weight.shape) for weight in store._weights)


def _is_small(module: nn.Module, weights: Sequence[SparseWeight]) -> bool:
    """Tell whether there is room for a dense copy of the module, to compare with."""
    dense, own = _dense_bytes(weights), [*module.parameters(), *module.buffers()]
    return dense <= DENSE_LIMIT and dense + sum(x.numel() * x.element_size() for x in own) <= COMPARED_LIMIT


def _dense_bytes(weights: Sequence[SparseWeight]) -> int:
    """Return the bytes of the dense weights."""
    return sum(weight.size * weight.values.element_size() for weight in weights)
