"""The time of a batch."""

import time
from statistics import median
from typing import Any

import torch

__all__ = ["Clock"]


class Clock:
    """Times batches: on CUDA by events on the device, without waiting for it; of very many, an even share."""

    _MOST = 2048

    def __init__(self) -> None:
        self._times: list[Any] = []
        self._begun: Any = None
        self._batches = 0
        self._stride = 1

    def start(self, device: torch.device) -> None:
        """Begin a batch."""
        self._begun = None
        if self._batches % self._stride == 0:
            self._begun = _event() if device.type == "cuda" else time.perf_counter()
        self._batches += 1

    def stop(self) -> None:
        """End a batch."""
        if self._begun is None:
            return
        on_host = isinstance(self._begun, float)
        self._times.append(time.perf_counter() - self._begun if on_host else (self._begun, _event()))
        if len(self._times) > self._MOST:
            self._times, self._stride = self._times[::2], self._stride * 2

    @property
    def median(self) -> float | None:
        """The median in seconds; None before the first batch."""
        if not self._times:
            return None
        if isinstance(self._times[-1], float):
            return float(median(self._times))
        self._times[-1][1].synchronize()
        return float(median(begun.elapsed_time(ended) for begun, ended in self._times)) / 1000


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
