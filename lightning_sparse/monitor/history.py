"""The records of a run's epochs."""

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["History"]


class History:
    """One record an epoch; the latest stays open, for metrics that are logged later."""

    def __init__(self) -> None:
        self._epochs: dict[int, str] = {}  # as JSON
        self._latest: dict[str, Any] | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Take the record of the epoch that ends."""
        self._latest = record

    def close(self, metrics: Callable[[], dict[str, float | None]]) -> None:
        """Complete the latest record, if it is open, by the metrics of its epoch."""
        if self._latest is not None:
            self._latest["metrics"] = metrics()
            self._epochs = self.epochs()
            self._latest = None

    def epochs(self) -> dict[int, str]:
        """Return the records of all epochs as JSON."""
        if self._latest is None:
            return self._epochs
        return {**self._epochs, self._latest["epoch"]: json.dumps(self._latest, allow_nan=False)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"epochs": {str(epoch): text for epoch, text in self.epochs().items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self._epochs = {int(epoch): text for epoch, text in state_dict["epochs"].items()}
