"""Store: where the weights of one method are kept; methods and families never ask which store they have."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sparse.compat.lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.trainer.adopt import Adoption, adopt
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import MaskedWeight

__all__ = ["MaskedStore", "Owner", "Storage", "Store"]

Storage = Literal["masked", "sparse"]


class Owner(Verbs, Callback, ABC):
    """What a store asks of the method whose weights it keeps."""

    _weights: dict[str, Weight]
    include: Sequence[str] | None
    exclude: Sequence[str]
    sparsity_target: float
    plain_checkpoints: bool | None

    #: layers pass connections on to each other, so their values change their length
    resizes: bool = False

    @property
    def surplus(self) -> int:
        """Number of connections that the layers have above the budget for now."""
        return 0

    @abstractmethod
    def draw(self, weights: Sequence[Weight], run_seed: int) -> None:
        """Give weights their first connections, from the beginning of the method's random numbers."""


class Store:
    """What every store does, and when; this one does nothing but say so.

    Args:
        method: whose weights are kept.
    """

    name: Storage

    def __init__(self, method: Owner) -> None:
        self.method = method

    # ------------------------------------------------------------------ a fit begins and ends

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Get ready before the module is configured and a checkpoint is loaded."""

    def begin_fit(self, trainer: Trainer) -> None:
        """See that a fit begins; its weights have not been chosen yet."""

    def begin_training(self, trainer: Trainer) -> None:
        """See that the weights have been taken over."""

    def abort(self) -> None:
        """Leave nothing behind in the module after an exception."""

    def end(self, stage: str) -> Callable[[], None]:
        """Return what is left to do when the method has let go of its weights."""
        return _nothing

    # ------------------------------------------------------------------ weights

    def refuse(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise unless all the weights are held as this store does."""
        for choice in choices:
            if (choice.sparse is not None) != (self.name == "sparse"):
                raise MisconfigurationException(
                    f"{choice.name} is {'' if choice.sparse is not None else 'not '}held by a sparse layer, but "
                    f"{self.method!r} trains with storage={self.name!r}. Leave it out with exclude, or make "
                    "sparse layers dense with lightning_sparse.storage.to_dense(module)."
                )

    def adopt(
        self, choices: Sequence[ParameterChoice], held: Mapping[str, Weight], resumed: bool
    ) -> tuple[Adoption, dict[str, Weight]]:
        """Return how the fit begins, and its weights.

        Args:
            choices: all of them selected and owned by an optimizer.
            held: what the method has of a checkpoint or an earlier fit.
            resumed: it is a checkpoint's.
        """
        raise NotImplementedError

    def add(self, choices: Sequence[ParameterChoice]) -> dict[str, Weight]:
        """Return weights that join a fit, all active."""
        raise NotImplementedError

    # ------------------------------------------------------------------ steps

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

    def load_weight(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        """Return a weight with the state of a checkpoint."""
        if ("shape" in state) != (self.name == "sparse"):
            raise MisconfigurationException(
                f"The checkpoint was written with another storage than {self.name!r}, which this "
                f"{self.method!r} has: give it the same."
            )
        return self._load(name, state, held)

    def _load(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        raise NotImplementedError

    def restore(self, weight: Weight, saved: Weight) -> None:
        """Give a weight in use the state of a loaded one."""
        raise NotImplementedError

    def refuse_late_state(self) -> None:
        """Raise if a state cannot be taken up any more, now that the fit has started."""

    def state_dict(self, weights: Mapping[str, Weight]) -> dict[str, Any]:
        """Return what a checkpoint keeps: the weights' state, and the store's own."""
        return {"weights": {name: weight.state() for name, weight in weights.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the store's own state."""

    def on_save_checkpoint(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the module's part of a checkpoint."""


class MaskedStore(Store):
    """Dense parameters, and a boolean mask beside each."""

    name = "masked"

    def adopt(  # noqa: D102  (inherited)
        self, choices: Sequence[ParameterChoice], held: Mapping[str, Weight], resumed: bool
    ) -> tuple[Adoption, dict[str, Weight]]:
        shapes = {name: weight.shape for name, weight in held.items()}
        adoption = adopt(self.method, choices, shapes, resumed, lambda: all(_fits(c, held[c.name]) for c in choices))
        weights = self.add(choices)
        for name, weight in weights.items() if adoption != "fresh" else ():
            self.restore(weight, held[name])
        return adoption, weights

    def add(self, choices: Sequence[ParameterChoice]) -> dict[str, Weight]:  # noqa: D102  (inherited)
        return {
            choice.name: MaskedWeight(
                choice.name,
                torch.ones_like(choice.parameter, dtype=torch.bool, requires_grad=False),
                choice.parameter,
                transposed_groups=choice.transposed_groups,
            )
            for choice in choices
        }

    def _load(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        return MaskedWeight(name, state["mask"].bool(), buffers=dict(state["buffers"]))

    def restore(self, weight: Weight, saved: Weight) -> None:  # noqa: D102  (inherited)
        assert isinstance(weight, MaskedWeight)
        assert isinstance(saved, MaskedWeight)
        weight.restore(saved)


def _fits(choice: ParameterChoice, state: Weight) -> bool:
    """Tell whether a parameter is 0 wherever an earlier fit left it inactive."""
    return not bool((choice.parameter.cpu() != 0).logical_and_(~state.mask.cpu()).any())


def _nothing() -> None:
    pass
