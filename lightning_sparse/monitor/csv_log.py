"""A CSV log with one row an epoch."""

import csv
from importlib import import_module
from typing import Any

from lightning_sparse.compat.lightning import PACKAGE

__all__ = ["EpochCSVLogger"]

_csv_logs: Any = import_module(f"{PACKAGE}.loggers.csv_logs")
_rank_zero_experiment: Any = import_module(f"{PACKAGE}.loggers.logger").rank_zero_experiment


class EpochCSVLogger(_csv_logs.CSVLogger):  # type: ignore[misc]  # found at run time
    """``CSVLogger`` with one row for all that an epoch logs: validation, training, methods and monitor.

    ``CSVLogger`` begins a row whenever something is logged. Here values join the latest row of their epoch, unless that
    row has a value of the same name, as where values are logged every so many steps: then a new row begins. So no value
    is lost. ``step`` is that of the latest value. Arguments are those of ``CSVLogger``.
    """

    _experiment: Any

    @property
    @_rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        """Return what writes the file."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment


class _Rows(_csv_logs.ExperimentWriter):  # type: ignore[misc]  # found at run time
    """Keeps all rows; what is on disk of them is written again only from the latest row on."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._columns: list[str] = []  # of the file
        self._saved, self._latest = 0, 0  # number of rows in the file, and where the latest of them begins

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Add values to the latest row, or begin a row."""
        super().log_metrics(metrics_dict, step)
        new = self.metrics.pop()
        row = self.metrics[-1] if self.metrics else {}
        if row.get("epoch") != new.get("epoch") or (row.keys() & new.keys()) - {"epoch", "step"}:
            row = {}
            self.metrics.append(row)
        row.update(new)

    def save(self) -> None:
        """Write what is new."""
        if not self.metrics:
            return
        changed = self.metrics[max(self._saved - 1, 0) :]
        columns = sorted({*self._columns, *(name for row in changed for name in row)})
        whole = columns != self._columns
        with open(self.metrics_file_path, "w" if whole else "r+", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if whole:
                writer.writeheader()
            else:
                file.seek(self._latest)
            for row in self.metrics if whole else changed:
                self._latest = file.tell()
                writer.writerow(row)
            file.truncate()
        self._columns, self._saved = columns, len(self.metrics)
