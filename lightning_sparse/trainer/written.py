"""Written: how it is noticed that other code has written into the parameter of a weight.

An operation in place, such as those of ``load_state_dict``, ``clamp_`` and ``reset_parameters``, is seen by its trace
at every step. A write through ``.data`` leaves none, so values are compared now and then; if one was found, always.
"""

from torch import nn

from lightning_sparse.compat.torch_private import trace

__all__ = ["Looks", "Traces"]

#: number of steps at which values are compared where writes are likely: at the start of an epoch, after a validation
_FIRST = 1

#: after these, values are compared at every step of this number
_EVERY = 256


class Traces:
    """What parameters looked like when the method had written them last."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, int]] = {}

    def note(self, parameter: nn.Parameter) -> None:
        """Take the present values for the method's own."""
        self._of[id(parameter)] = trace(parameter)

    def differs(self, parameter: nn.Parameter) -> bool:
        """Tell whether other code has left a trace since then."""
        return self._of.get(id(parameter)) != trace(parameter)


class Looks:
    """At which steps the values themselves are compared."""

    def __init__(self) -> None:
        self._left = _FIRST
        self._steps = 0
        self._always = False

    @property
    def fresh(self) -> bool:
        """No step has been made since it became likely that other code has written."""
        return self._left == _FIRST

    def soon(self) -> None:
        """Look at the next steps."""
        self._left = max(self._left, _FIRST)

    def always(self) -> None:
        """Look at each step from now on."""
        self._always = True

    def due(self) -> bool:
        """Count a step, and tell whether values are compared at it."""
        self._steps += 1
        self._left = max(self._left - 1, -1)
        return self._always or self._left >= 0 or self._steps % _EVERY == 0
