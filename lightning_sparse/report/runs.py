"""A run's files: ``sparsity.json`` of SparsityMonitor and, where there are any, ``config.yaml`` and ``metrics.csv``."""

import csv
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sparse.monitor.run_file import FILE, FORMAT

__all__ = ["Run", "Values", "known", "last", "number", "read"]

Values = list[float | None]

#: keys of the file that no page can do without
_REQUIRED = ("status", "epochs")


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: its log directory.
        record: contents of ``sparsity.json``.
        config: text of LightningCLI's ``config.yaml``, None without one.
        tests: metrics of a test, by name, from ``metrics.csv`` of CSVLogger.
    """

    folder: Path
    record: dict[str, Any]
    config: str | None = None
    tests: dict[str, float] = field(default_factory=dict)

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """What was recorded at the end of each epoch."""
        return list(self.record["epochs"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The selected weights; none are known of a run that failed before its first step."""
        return list(self.record.get("layers") or [])

    @property
    def method(self) -> str | None:
        """Name of the sparse method; None: dense."""
        method = self.record.get("method")
        return method["name"] if method else None

    def series(self, key: str) -> list[float | None]:
        """Return a value of each epoch; None where it is unknown or not finite."""
        return [number(epoch.get(key)) for epoch in self.epochs]

    def metric(self, name: str) -> list[float | None]:
        """Return a metric of each epoch; None where it is unknown or not finite."""
        return [number((epoch.get("metrics") or {}).get(name)) for epoch in self.epochs]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that some epoch has, without this package's own."""
        names = dict.fromkeys(name for epoch in self.epochs for name in epoch.get("metrics") or {})
        return [name for name in names if not name.startswith("sparsity/")]


def read(folder: str | Path) -> Run:
    """Read the files of a run.

    Args:
        folder: the run's log directory, such as ``runs/NAME/version_0``.

    Raises:
        FileNotFoundError: there is no ``sparsity.json``; the message says how a run gets one.
        ValueError: the file is broken or of another format.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(_missing(folder))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again from where the run wrote it.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(
            f"{path} must have format {FORMAT}, got {found!r}. "
            "Make the page with the version of lightning_sparse that wrote the run."
        )
    missing = [key for key in _REQUIRED if key not in record]
    if missing:
        raise ValueError(f"{path} must have {', '.join(missing)}. Is it a file of SparsityMonitor?")
    if not isinstance(record["epochs"], list) or not all(isinstance(epoch, dict) for epoch in record["epochs"]):
        raise ValueError(f"{path} must have a list of epochs. Copy it again from where the run wrote it.")
    config = folder / "config.yaml"
    try:
        text = config.read_text(encoding="utf-8") if config.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{config} is not text ({error}). Remove it: the page does not need it.") from error
    return Run(folder, record, text, _tests(folder / "metrics.csv"))


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def last(values: Values) -> float | None:
    """Return the last value that is known."""
    return next((value for value in reversed(values) if value is not None), None)


def known(values: Values) -> list[float]:
    """Return the values that are known."""
    return [value for value in values if value is not None]


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no directory {folder}. Name a run's log directory, such as runs/NAME/version_0."
    near = sorted(str(path.parent) for path in folder.glob(f"*/{FILE}"))
    if near:
        return f"{folder} has no {FILE}, but these have: {', '.join(near)}. Name one of them."
    return (
        f"{folder} has no {FILE}. Train with the callback SparsityMonitor (in YAML: class_path: "
        "lightning_sparse.SparsityMonitor among trainer.callbacks), which writes it into the run's log directory."
    )


def _tests(path: Path) -> dict[str, float]:
    """Return the last value of each column of ``metrics.csv`` whose name begins with "test"."""
    if not path.is_file():
        return {}
    found = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                found.update(
                    {name: float(value) for name, value in row.items() if name and name[:4] == "test" and value}
                )
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a table of numbers ({error}). Remove it: the page does not need it."
        ) from error
    return found
