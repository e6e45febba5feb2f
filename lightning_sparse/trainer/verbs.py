"""Verbs: what a family of methods defines, in the order in which a step of training passes through them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.trainer.fit import Fit, steps

__all__ = ["Verbs"]


class Verbs(ABC):
    """The verbs of a method, and what guards and readouts ask of it.

    - ``attach``: fit start: take the chosen weights over, from a checkpoint's state if there is one
    - ``attach_added``: the same for weights that join an optimizer later
    - ``begin_epoch``: set what changes from epoch to epoch
    - ``take_writes``: other code may have written into the parameters: go on with what it wrote
    - ``before_step``: once a step, when gradients are whole: make them the gradients of the method
    - ``before_update``: the optimizer's update is about to run
    - ``after_update``: the update has run: bring back exact zeros
    - ``abort_update``: the update was broken off: bring back exact zeros
    """

    #: what is kept of each weight, by parameter name: with the number of its elements, ``size``
    _weights: Mapping[str, Any]

    #: the fit that the method is in
    _fit: Fit

    #: numbers of "epochs" and "steps" of the Trainer before the fit
    _before_fit: dict[str, int]

    #: connections move after the fit has begun
    moves: bool = True

    #: ``effective`` and ``gradients`` of a method with latent weights take all weights of an optimizer as one, with
    #: vectors in place of matrices (``weights/joined.py``); who overrides one of them says so again
    joins: bool = False

    #: the step that moves connections computes the gradients of all weights
    dense_gradient_to_move: bool = False

    #: each step, not only one that moves connections, uses the gradients of all weights
    needs_whole_gradients: bool = True

    def gradient_positions(self, name: str) -> Tensor | None:
        """Return the flat positions of a weight whose gradients the next step uses, ascending; None: it uses all."""
        return None

    @property
    def needs_whole_weights(self) -> str | None:
        """What helps where processes hold parts of each weight, which the method cannot train; None: it can."""
        return "Use a single device or strategy='ddp'."

    #: where weights are divided over processes, these may hold columns, or the same as others; also in ``attach``
    takes_tensor_parallel: bool = False

    @property
    def planned_density(self) -> dict[str, float]:
        """The density that each layer is to have, by parameter name, once ``attach`` has run; empty: training tells."""
        return {}

    @property
    def total_steps(self) -> float:
        """Number of optimizer steps of the whole fit, on the first process; infinite if nothing tells how many."""
        assert self._fit.trainer is not None
        own = steps(self._fit.trainer, self._before_fit)
        return self._fit.first_steps.get(own, own)

    @abstractmethod
    def choices_in(self, module: nn.Module) -> list[ParameterChoice]:
        """Return all parameters of ``module``, and of each whether it is made sparse, or why not."""

    @abstractmethod
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take over the weights of ``choices`` (or release those of an earlier fit and take over these).

        Args:
            choices: all of them selected and owned by one of ``optimizers``.
            optimizers: the Trainer's.
            resumed: the state that was loaded belongs to these weights and must fit them.
        """

    @abstractmethod
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Take over weights that joined ``optimizer`` after the fit started."""

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: B027  (not all have anything that changes)
        """Set what changes from epoch to epoch; ``epochs`` is their number, None if it is not known."""

    def take_writes(self, by_value: bool, optimizer: Optimizer | None = None) -> None:  # noqa: B027  (not all keep any)
        """Go on with what other code has written into the parameters since the method did.

        Args:
            by_value: compare the values as well, which finds writes that leave no trace.
            optimizer: whose weights are looked at; None: all.
        """

    @abstractmethod
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Turn the weights' gradients into the method's.

        Args:
            optimizer: only its weights have whole gradients now.
            share: the part of the accumulation window that had a backward pass, 1 as a rule: a penalty added to the
                loss of every micro-batch has this weight. 0: gradients, if there are any, are those of an earlier step
                (in the batch-norm epoch of StochasticWeightAveraging), and the weights must stay as they are.
            scale: the factor that the gradients still carry (fused optimizers under AMP), else 1.
        """

    @abstractmethod
    def before_update(self, optimizer: Optimizer) -> None:
        """Prepare the parameters of ``optimizer`` for its update."""

    @abstractmethod
    def after_update(self, optimizer: Optimizer) -> None:
        """Bring back exact zeros after the update of ``optimizer``."""

    @abstractmethod
    def abort_update(self) -> None:
        """Bring back exact zeros in the middle of an update that was broken off."""

    @abstractmethod
    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise if one of the selected weights is held in a way that this method cannot train."""

    def refuse_trainer(self, trainer: Any) -> None:  # noqa: B027  (most have nothing to refuse)
        """Raise if there is something that this family cannot train with."""

    def warn_at_epoch_end(self) -> None:  # noqa: B027  (most have nothing to tell)
        """Warn, at the end of an epoch, of what only this family can see."""

    def warn_once(self, message: str) -> None:
        """Give a warning once in a fit, whatever follows its first colon."""
        key = message.removeprefix(repr(self)).split(":")[0]
        self._fit.warn_once(key, message)
