"""Optimizers that hand their step to another one (Lookahead and its like), and what listens to steps."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn

from lightning_sparse.compat.torch_private import calls_step_hooks

__all__ = ["StepHook", "hook_step", "states", "stepping", "takes_matrices_alone", "wrapped"]

Before = Callable[[Any, Any, Any], tuple[Any, Any] | None]
After = Callable[[Any, Any, Any], None]


def wrapped(optimizer: Any) -> list[Any]:
    """Return an optimizer and those within it, to which it hands its step: the outermost first.

    Those within are what it holds as attributes, also in lists, and what trains some of its parameters.

    >>> import torch
    >>> class Lookahead(torch.optim.SGD):
    ...     pass
    >>> weights = [torch.zeros(2, requires_grad=True)]
    >>> outer, other = Lookahead(weights), torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    >>> outer.base, outer.discriminator = torch.optim.SGD(weights), other
    >>> wrapped(outer) == [outer, outer.base]
    True
    """
    return [each for each, _ in _with_those_within(optimizer)]


def stepping(optimizer: Any) -> list[Any]:
    """Return those that make the step: the optimizer itself, or the innermost ones that it hands its step to."""
    return [each for each, within in _with_those_within(optimizer) if not within]


def states(optimizer: Any, parameter: nn.Parameter) -> list[dict[str, Any]]:
    """Return what an optimizer, and each of those within it, keeps for a parameter."""
    kept = {id(each.state): each.state for each in wrapped(optimizer)}
    found = (state.get(parameter) for state in kept.values())
    return [*{id(state): state for state in found if state is not None}.values()]


def takes_matrices_alone(optimizer: Any) -> bool:
    """Tell whether an optimizer, or one within it, trains matrices and refuses vectors, as Muon does."""
    return any("Muon" in kind.__name__ for each in wrapped(optimizer) for kind in type(each).__mro__)


def hook_step(optimizer: Any, before: Before, after: After) -> list[Any]:
    """Call ``before`` and ``after`` around each step, as torch's hooks are; return what ends it, with ``remove``.

    Raises:
        AttributeError: torch calls no hooks in this optimizer's step, and it does not let others in.
    """
    if calls_step_hooks(optimizer):
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    return [StepHook(optimizer, before, after)]


class StepHook:
    """A hook on the ``step`` of one optimizer that torch does not hook: one that did not run ``Optimizer.__init__``.

    Args:
        optimizer: anything with a ``step``.
        before: called with it, the arguments (it is the first) and the named ones; may return others.
        after: called with the same when the step has been made.
    """

    def __init__(self, optimizer: Any, before: Before, after: After) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._own = vars(optimizer).get("step")  # of the object, such as a learning-rate scheduler puts there
        self._inner = optimizer.step
        self._live = True
        self._step = optimizer.step = MethodType(self._call, optimizer)

    def _call(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._live:
            return self._inner(*args, **kwargs)
        changed = self._before(optimizer, (optimizer, *args), kwargs)
        if changed is not None:
            args, kwargs = changed[0][1:], changed[1]
        result = self._inner(*args, **kwargs)
        self._after(optimizer, (optimizer, *args), kwargs)
        return result

    def remove(self) -> None:
        """Give the optimizer its own step back; if others have hooked it since, call nothing any more."""
        self._live = False
        if vars(self._optimizer).get("step") is not self._step:
            return
        if self._own is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._own


def _with_those_within(optimizer: Any) -> list[tuple[Any, list[Any]]]:
    """Return what ``wrapped`` does, each with those that it hands its step to."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    waiting = [optimizer]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found:
            within = _within(each)
            found[id(each)] = each, within
            waiting += within
    return [*found.values()]


def _within(optimizer: Any) -> list[Any]:
    """Return the optimizers that another one holds and that train some of its parameters."""
    held = [each for each in _attributes(optimizer) if _steps(each) and each is not optimizer]
    if not held:
        return []
    ours = _parameters(optimizer)
    return [each for each in held if ours & _parameters(each)]


def _attributes(optimizer: Any) -> Iterator[Any]:
    for value in getattr(optimizer, "__dict__", {}).values():
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _steps(value: Any) -> bool:
    kind: Any = type(value)  # mypy takes type[Any] for not hashable
    return _can_step(kind) and hasattr(value, "param_groups")


@lru_cache(maxsize=1024)
def _can_step(kind: Any) -> bool:
    # of a class: a parameter or module answers what it does not have by an error of its own, which takes time
    return callable(getattr(kind, "step", None))


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
