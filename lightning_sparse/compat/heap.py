"""Memory that has been freed, given back to the system."""

import contextlib
import ctypes
import mmap
from typing import Any

__all__ = ["trim_heap"]

_trim: Any = None
_resident_then = 0  # after the last time
with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function; or, on Windows, no such library
    _trim = ctypes.CDLL(None).malloc_trim


def trim_heap(spare: int = 0) -> None:
    """Have the C library return what it holds between things that live on; where it cannot (not glibc), do nothing.

    Connections move by way of indices that are several times as large as the values and soon freed, but glibc keeps
    the pages. It takes some milliseconds, and the pages that are needed again are made anew, which takes more.

    Args:
        spare: bytes by which the process may have grown since the last time without anything being done.
    """
    global _resident_then
    if _trim is None or (spare and 0 <= _resident() - _resident_then < spare):
        return
    _trim(0)
    _resident_then = _resident()


def _resident() -> int:
    """Return the bytes of memory that the process has now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
