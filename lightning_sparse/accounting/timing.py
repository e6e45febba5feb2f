"""Time of what a device computes."""

import time
from collections.abc import Callable

import torch

__all__ = ["seconds", "synchronize"]


def synchronize(device: torch.device | str) -> None:
    """Wait for what the device still computes."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], count: int, device: torch.device | str) -> float:
    """Return the mean time of ``count`` calls of ``step``, which computes on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count
