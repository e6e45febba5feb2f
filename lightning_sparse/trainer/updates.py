"""UpdateHooks: a method's verbs around each update of an optimizer, however it is stepped."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.optimizers import hook_step, wrapped
from lightning_sparse.compat.torch_private import found_infinite, takes_scaled_gradients
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["UpdateHooks", "skips", "unscales"]


class UpdateHooks:
    """Hooks on optimizers that call ``before_step`` (if nobody has), ``before_update`` and ``after_update``.

    Args:
        method: whose verbs are called.

    Attributes:
        awake: steps are updates. Torch makes others, with a learning rate of 0, where it saves or restores the state of
            an optimizer that has none yet (``get_optimizer_state_dict``, as ModelParallelStrategy does).
    """

    awake = True

    def __init__(self, method: Verbs) -> None:
        self.method = method
        self._prepared: set[int] = set()  # optimizers whose gradients are the method's already
        self._depth: dict[int, int] = {}  # of steps within each other

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to a fit."""
        return {"method": self.method, "_prepared": set(), "_depth": {}}

    def register(self, optimizer: Optimizer) -> list[Any]:
        """Put the hooks on ``optimizer`` and on those that it hands its step to; return what takes them away.

        Whichever is stepped first makes the update of ``optimizer``: what an outer one does beside the step of an inner
        one, as Lookahead does, is a part of the update.
        """
        handles: list[Any] = []
        for each in wrapped(optimizer):
            try:
                handles += hook_step(each, partial(self._before, optimizer), partial(self._after, optimizer))
            except AttributeError as error:
                raise MisconfigurationException(
                    f"{self.method!r} acts around the step of {type(each).__name__}, which calls no hooks and takes "
                    f"none ({error}). Derive it from torch.optim.Optimizer and call super().__init__(params, defaults)."
                ) from error
        return handles

    def prepare(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Make the gradients the method's, ahead of the update."""
        self.method.before_step(optimizer, share, scale)
        self._prepared.add(id(optimizer))

    def forget_prepared(self) -> None:
        """Forget gradients that were made ready for an update which AMP has skipped."""
        self._prepared.clear()

    @property
    def unseen(self) -> bool:
        """Gradients were made ready for an update that no hook has seen, if it was made."""
        return bool(self._prepared)

    def forget_broken_off(self) -> None:
        """Forget updates that an exception has broken off."""
        self._depth.clear()

    def _before(self, optimizer: Optimizer, stepped: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Enter right before the update, which is after the closure (forward and backward) if there is one.

        Args:
            optimizer: the Trainer's.
            stepped: it, or one within it.
            args: of its step; the first is ``stepped``.
            kwargs: of its step.
        """
        if not self.awake:
            return None
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if self._depth[id(optimizer)] > 1:  # a step that calls that of its base class, or of an inner optimizer
            return None
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._enter(optimizer)
            return None

        called = False

        def closure_then_enter() -> Any:
            nonlocal called
            if called:  # the weights of within the update, which are dense for methods with latent ones
                raise MisconfigurationException(
                    f"{self.method!r} cannot train with {type(optimizer).__name__}, which evaluates the loss "
                    "several times within a step. Use an optimizer that does it once, such as SGD or AdamW."
                )
            called = True
            result = closure()
            self._enter(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_enter}
        return (args[0], closure_then_enter, *args[2:]), kwargs

    def _enter(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._prepared:  # stepped directly, past Lightning's hooks
            self.method.before_step(optimizer, 1.0, 1.0)
        self.method.before_update(optimizer)

    def _after(self, optimizer: Optimizer, stepped: Any, args: Any, kwargs: Any) -> None:
        if not self.awake:
            return
        self._depth[id(optimizer)] -= 1
        if self._depth[id(optimizer)] > 0:
            return
        self._prepared.discard(id(optimizer))
        self.method.after_update(optimizer)


def unscales(optimizer: Optimizer | None) -> bool:
    """Tell whether a gradient scaler, if any, divides the gradients itself; otherwise a fused optimizer does."""
    return not takes_scaled_gradients(optimizer)


def skips(optimizer: Optimizer) -> bool:
    """Tell, right after its step, whether a fused optimizer under AMP has found infinite gradients: no update."""
    found = found_infinite(optimizer)
    return found is not None and bool(found)
