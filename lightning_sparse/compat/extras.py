"""Packages beyond torch and Lightning: imported where they are used, with an error that names the extra."""

import importlib
from types import ModuleType

__all__ = ["extra"]


def extra(module: str, extras: str) -> ModuleType:
    """Import ``module``, which comes with the extras of that name.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.

    >>> extra("no_such_module", "examples")
    Traceback (most recent call last):
    ModuleNotFoundError: no_such_module is not installed: pip install 'lightning-sparse[examples]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        raise ModuleNotFoundError(
            f"{missing} is not installed: pip install 'lightning-sparse[{extras}]'", name=missing
        ) from error
