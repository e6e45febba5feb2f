"""Memory that has been freed, given back to the system."""

import contextlib
import ctypes
from typing import Any

__all__ = ["trim_heap"]

_trim: Any = None
with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function; or, on Windows, no such library
    _trim = ctypes.CDLL(None).malloc_trim


def trim_heap() -> None:
    """Have the C library return what it holds between things that live on; where it cannot (not glibc), do nothing.

    Connections move by way of indices that are several times as large as the values and soon freed, but glibc keeps
    the pages. It takes some milliseconds.
    """
    if _trim is not None:
        _trim(0)
