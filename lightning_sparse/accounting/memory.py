"""Memory of this process, as the operating system counts it."""

import sys
from pathlib import Path

__all__ = ["peak_memory", "resident_memory"]


def _linux(entry: str) -> float | None:
    """Return an entry of the kernel's account of this process in bytes, None on other systems.

    Unlike ``ru_maxrss`` it does not begin with the memory of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * float(status.split(f"{entry}:")[1].split()[0])
    except (OSError, IndexError):
        return None


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in bytes; NaN where the system does not tell."""
    peak = _linux("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident_memory() -> float:
    """Return the resident memory of this process now, in bytes; where only the peak is known, the peak."""
    now = _linux("VmRSS")
    return peak_memory() if now is None else now
