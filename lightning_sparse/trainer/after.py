"""After: what is to happen once the Trainer has called a method of the module."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_sparse.compat.lightning import LightningModule

__all__ = ["After"]


class After:
    """Calls ``function``, with the same arguments, once, when the Trainer has called the module's ``method``.

    That call runs within the context ``during``.
    """

    def __init__(
        self,
        module: LightningModule,
        method: str,
        function: Callable[..., None] | None = None,
        during: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        own = getattr(module, method)

        def hook(*args: Any) -> Any:
            self.remove()
            with during():
                result = own(*args)
            if function is not None:
                function(*args)
            return result

        self._module, self._method, self._hook = module, method, hook
        self._replaced = vars(module).get(method)  # such as LightningCLI sets
        setattr(module, method, hook)

    def remove(self) -> None:
        """Give the module its own method back."""
        if vars(self._module).get(self._method) is self._hook:
            delattr(self._module, self._method)
            if self._replaced is not None:
                setattr(self._module, self._method, self._replaced)
