"""What trainings have left: their logs, read; a table of means and standard deviations over the seeds."""

import csv
import json
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning_sparse
from lightning_sparse.monitor.run_file import FILE
from lightning_sparse.rules.clock import FEW

__all__ = [
    "COLUMNS",
    "Column",
    "Row",
    "by_sparsity",
    "few_updates",
    "history",
    "is_percent",
    "markdown",
    "measured",
    "narrow",
    "numbers",
    "shortened",
    "summarise",
    "write_csv",
]

Epoch = dict[str, float]


# ---------------------------------------------------------------------- one run


def history(folder: Path) -> list[Epoch]:
    """Return what a run logged in each epoch, from ``metrics.csv`` of all its attempts.

    An attempt goes on from a checkpoint of an earlier one: of an epoch that both have, the later one's values count.

    Args:
        folder: holds ``version_N/metrics.csv``.
    """
    epochs: dict[int, Epoch] = {}
    for attempt in _attempts(folder):
        found: dict[int, Epoch] = {}
        if (attempt / "metrics.csv").exists():
            with (
                _as_written(attempt / "metrics.csv"),
                open(attempt / "metrics.csv", newline="", encoding="utf-8") as lines,
            ):
                for row in csv.DictReader(lines):
                    if row.get("epoch"):
                        values = {key: float(value) for key, value in row.items() if value}
                        found.setdefault(int(row["epoch"]), {}).update(values)
        epochs.update(found)
    return [epochs[epoch] for epoch in sorted(epochs)]


def _monitored(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs of ``sparsity.json``, which SparsityMonitor writes, of all attempts; empty without it."""
    epochs: dict[int, dict[str, Any]] = {}
    for attempt in _attempts(folder):
        if (attempt / FILE).exists():
            with _as_written(attempt / FILE):
                written = json.loads((attempt / FILE).read_text(encoding="utf-8"))
                epochs.update((epoch["epoch"], epoch) for epoch in written["epochs"])
    return [epochs[epoch] for epoch in sorted(epochs)]


@contextmanager
def _as_written(file: Path) -> Iterator[None]:
    """Turn what fails within, since a file is broken, into an error that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{file} must be as a run writes it, but is broken ({type(error).__name__}: {error}). Remove its folder to "
            "train again."
        ) from error


def _attempts(folder: Path) -> list[Path]:
    """Return the folders ``version_N`` in order."""
    return sorted(folder.glob("version_*"), key=lambda attempt: int(attempt.name.partition("_")[2]))


def measured(folder: Path, epochs: Sequence[Epoch], metric: str) -> list[Epoch]:
    """Return those of the ``epochs`` of a run that logged the metric.

    Args:
        folder: of the run, which the message names.
        epochs: its ``history``.
        metric: name of a logged value.

    Raises:
        ValueError: none did; the message says what they logged.
    """
    found = [epoch for epoch in epochs if metric in epoch]
    if not found:
        logged = sorted({key for epoch in epochs for key in epoch} - {"epoch", "step"})
        raise ValueError(f"{folder} has logged no {metric!r}. Choose --metric among: {', '.join(logged)}.")
    return found


def numbers(folder: Path, metric: str, method: str, sparsity: float | None) -> Epoch:
    """Return the numbers of one finished run, by name of ``COLUMNS``; what is not known is left out.

    Args:
        folder: of the run.
        metric: name of a logged value; that of the last epoch that has it counts.
        method: the class's name, or "dense".
        sparsity: that the method was given, if any.

    Raises:
        ValueError: the run did not log the metric, or its density to the end.
    """
    epochs = history(folder)
    last = measured(folder, epochs, metric)[-1]
    found = {"metric": last[metric]}
    if method == "dense":
        found["density"] = 1.0
    sparse = [epoch for epoch in epochs if "sparsity/model" in epoch]
    if method != "dense" and (not sparse or sparse[-1]["epoch"] < last["epoch"]):
        # it was killed after its last checkpoint, before its last line: going on from there logs nothing more
        raise ValueError(f"the log in {folder} lacks the density of the last epoch. Remove the folder and run again.")
    if sparse:
        found["density"] = 1 - sparse[-1]["sparsity/model"]
        if "sparsity/backward" in sparse[-1]:
            found["backward_density"] = 1 - sparse[-1]["sparsity/backward"]
    both = [epoch for epoch in sparse if metric in epoch]
    if both and sparsity is None:
        sparsest = max(both, key=lambda epoch: epoch["sparsity/model"])
        found["sparsest_density"] = 1 - sparsest["sparsity/model"]
        found["sparsest_metric"] = sparsest[metric]
    return {**found, **_costs(_monitored(folder))}


def _costs(epochs: Sequence[Mapping[str, Any]]) -> Epoch:
    """Return counts of the last epoch, the median of the epochs' times of a step, and the largest memory."""
    names = {"updates", *(column.name for column in COLUMNS)} - {"metric", "density", "backward_density"}
    known = {key: [float(epoch[key]) for epoch in epochs if epoch.get(key) is not None] for key in names}
    choose: dict[str, Callable[[list[float]], float]] = {"step_time_s": statistics.median, "peak_memory_bytes": max}
    last: Callable[[list[float]], float] = operator.itemgetter(-1)
    return {key: choose.get(key, last)(values) for key, values in known.items() if values}


# ---------------------------------------------------------------------- all runs


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: in the CSV, where values are plain: shares from 0 to 1, seconds, bytes.
        title: in the Markdown table.
        scale: of the values there.
        digits: after the point there.
        short: in the narrow table; empty: not there.
    """

    name: str
    title: str
    scale: float
    digits: int
    short: str = ""


COLUMNS = (
    Column("metric", "{}", 1, 4, "{}"),
    Column("density", "density %", 100, 2, "density %"),
    Column("backward_density", "backward density %", 100, 2),
    Column("sparsest_density", "sparsest epoch: density %", 100, 2),
    Column("sparsest_metric", "sparsest epoch: {}", 1, 4),
    Column("empty_neurons", "empty neurons %", 100, 1),
    Column("empty_inputs", "empty inputs %", 100, 1),
    Column("shrunk_size", "dense weights without these, %", 100, 1),
    Column("inference_flops", "inference FLOPs, theoretical, % of dense", 100, 1),
    Column("training_flops", "training FLOPs, theoretical, % of dense", 100, 1, "FLOPs %"),
    Column("step_time_s", "step ms, measured", 1e3, 2, "step ms"),
    Column("peak_memory_bytes", "peak memory MiB, measured", 2**-20, 0, "MiB"),
)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        method: the class's name, or "dense".
        title: the method with its arguments.
        sparsity: that it was given, None if none was.
        runs: the numbers of its finished runs by seed.
    """

    method: str
    title: str
    sparsity: float | None
    runs: Mapping[int, Epoch]

    def values(self, name: str) -> list[float]:
        """Return the values of a column, one a run that has it."""
        return [run[name] for run in self.runs.values() if name in run]


def summarise(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, which one value does not have.

    >>> summarise([0.5, 0.75, 1.0]), summarise([0.5])
    ((0.75, 0.25), (0.5, None))
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def is_percent(rows: Sequence[Row], metric: str) -> bool:
    """Return whether the metric is to be shown in percent: its name holds "acc", and its values are from 0 to 1."""
    return "acc" in metric and all(0 <= value <= 1 for row in rows for value in row.values("metric"))


def markdown(rows: Sequence[Row], metric: str) -> str:
    """Return the table: mean ± sample standard deviation, without columns that no run has.

    For the metric's unit see :func:`is_percent`.
    """
    return _table(_cells(rows, [column for column in _columns(rows, metric) if _known(rows, column)]))


def narrow(rows: Sequence[Row], metric: str, width: int = 100) -> str:
    """Return the table with as many of the most important columns as fit into ``width`` characters, at least one."""
    columns = [replace(column, title=column.short) for column in _columns(rows, metric) if column.short]
    columns = [column for column in columns if _known(rows, column)]
    while True:
        text = _table(_cells(rows, columns))
        if len(columns) < 2 or text.index("\n") <= width:
            return text
        columns = columns[:-1]


def shortened(rows: Sequence[Row], length: int = 26) -> list[Row]:
    """Return the rows with titles cut to ``length`` characters, but for those that could not be told apart then."""
    titles = {row.title: row.title for row in rows}
    titles |= {title: f"{title[: length - 3]}..." for title in titles if len(title) > length}
    cut = list(titles.values())
    return [replace(row, title=titles[row.title] if cut.count(titles[row.title]) == 1 else row.title) for row in rows]


def few_updates(row: Row) -> int | None:
    """Return how often connections moved in the run with the fewest moves, if the method needs more of them."""
    updates = row.values("updates")
    moves = hasattr(getattr(lightning_sparse, row.method, None), "update_every")
    return int(min(updates)) if moves and updates and min(updates) < FEW else None


def _known(rows: Sequence[Row], column: Column) -> bool:
    return any(row.values(column.name) for row in rows)


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """Return the cells of the table, the header first."""
    table = [["method", "sparsity", *(column.title for column in columns), "seeds"]]
    for row in rows:
        cells = [_cell(row.values(column.name), column) for column in columns]
        table.append([row.title, "" if row.sparsity is None else f"{row.sparsity:g}", *cells, str(len(row.runs))])
    return table


def by_sparsity(rows: Sequence[Row], metric: str) -> str:
    """Return the metric alone, a row for each method and a column for each sparsity; nothing for fewer than two.

    Methods that find a density of their own have it beside the metric, and dense training has 100 %.
    """
    sparsities = sorted({row.sparsity for row in rows if row.sparsity is not None})
    if len(sparsities) < 2:
        return ""
    columns = {column.name: column for column in _columns(rows, metric)}
    table = [[f"{columns['metric'].title} at sparsity", *(f"{s:g}" for s in sparsities), "at its own density"]]
    for title in dict.fromkeys(row.title for row in rows):
        cells = {row.sparsity: _cell(row.values("metric"), columns["metric"]) for row in rows if row.title == title}
        own = [_cell(row.values("density"), columns["density"]).partition(" ")[0] for row in rows if row.title == title]
        at_own = f"{cells[None]} at {own[0]} %" if cells.get(None) else ""
        table.append([title, *(cells.get(sparsity, "") for sparsity in sparsities), at_own])
    return _table(table)


def _table(table: list[list[str]]) -> str:
    table = [[cell.replace("|", "\\|") for cell in line] for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _columns(rows: Sequence[Row], metric: str) -> Iterator[Column]:
    """Yield the columns with the metric's name and unit."""
    percent = is_percent(rows, metric)
    for column in COLUMNS:
        if column.name in ("metric", "sparsest_metric"):
            title, short = (text.format(f"{metric} %" if percent else metric) for text in (column.title, column.short))
            scale, digits = (100, 2) if percent else (1, 4)
            yield Column(column.name, title, scale, digits, short)
        else:
            yield column


def _cell(values: Sequence[float], column: Column) -> str:
    if not values:
        return ""
    mean, deviation = summarise([column.scale * value for value in values])
    text = f"{mean:.{column.digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{column.digits}f}"


def write_csv(rows: Sequence[Row], metric: str, table: Path, runs: Path) -> None:
    """Write means and deviations to one file, and the numbers of every run to another, in plain units."""
    names = {column.name: column.name.replace("metric", metric) for column in COLUMNS}
    means: list[dict[str, Any]] = []
    singles: list[dict[str, Any]] = []
    for row in rows:
        first = {"method": row.title, "sparsity": row.sparsity}
        mean: dict[str, Any] = {**first, "seeds": len(row.runs)}
        for name, title in names.items():
            values = row.values(name)
            mean[f"{title}_mean"], mean[f"{title}_std"] = summarise(values) if values else (None, None)
        means.append(mean)
        for seed, run in row.runs.items():
            singles.append({**first, "seed": seed, **{title: run.get(name) for name, title in names.items()}})
    for file, lines in ((table, means), (runs, singles)):
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, lines[0] if lines else [])
            writer.writeheader()
            writer.writerows(lines)
