"""Watch: what listens to layers from before the step that moves connections until they have been moved."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

from lightning_sparse.compat.compiled import Uncompiled, can_pause, is_compiled
from lightning_sparse.layers.unit_activity import Hooks
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup, WeightGroups

__all__ = ["Watch"]


class _Method(Protocol):
    """What a watch asks of its method."""

    _fit: Fit
    _groups: WeightGroups

    def is_due(self, group: WeightGroup) -> bool: ...

    def watchers(self, weights: Sequence[Weight]) -> list[Hooks]: ...

    def warn_once(self, message: str) -> None: ...


class Watch:
    """The listeners of each optimizer's weights, while their connections are about to be moved.

    Args:
        method: whose ``watchers`` listen.
    """

    def __init__(self, method: _Method) -> None:
        self.method = method
        self._hooks: dict[int, list[Hooks | Uncompiled]] = {}

    def begin(self) -> None:
        """Listen to the weights of each optimizer whose next step moves connections."""
        if self.method._fit.module is None:
            return
        for key, group in self.method._groups.items():
            if group.weights and key not in self._hooks and (group.due or self.method.is_due(group)):
                listeners = self.method.watchers(group.weights)
                self._hooks[key] = [*listeners, Uncompiled()] if listeners else []  # compiled code would not tell
                if listeners and not can_pause() and is_compiled(self.method._fit.module):
                    self.method.warn_once(
                        f"{self.method!r} moves connections by what enters and leaves the layers, which compiled "
                        "ones do not tell: connections may grow in the wrong places. Update to PyTorch 2.6 or later, "
                        "or train uncompiled."
                    )

    def of(self, optimizer: Optimizer | None, *kinds: type[Any]) -> Any:
        """Return the listener of these kinds to the weights of ``optimizer``, None if there is none."""
        return next((hooks for hooks in self._hooks.get(id(optimizer), []) if isinstance(hooks, kinds)), None)

    def end(self, optimizer: Optimizer | None = None) -> None:
        """Listen no longer: to the weights of ``optimizer``, or to any."""
        for key in list(self._hooks) if optimizer is None else [id(optimizer)]:
            for hooks in self._hooks.pop(key, []):
                hooks.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the hooks."""
        return {"method": self.method, "_hooks": {}}
