"""The plot of a comparison: accuracy over density, one curve a method."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.compare.results import Row, is_percent, summarise
from lightning_sparse.compat.extras import extra
from lightning_sparse.report.charts import COLOURS

__all__ = ["draw"]

#: markers and lines tell apart what has the same colour
_COLOURS = (*COLOURS, "#999933", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":")
_ACROSS = ("--", "-.", ":")
_TICKS = [factor * 10.0**power for power in range(-4, 3) for factor in (1, 2, 5)]


def draw(rows: Sequence[Row], metric: str, title: str, files: Sequence[Path]) -> None:
    """Draw means of the seeds with error bars of one sample standard deviation; dense is a line across.

    Args:
        rows: of the table, those of one curve with the same title.
        metric: its name, for the axis; for its unit see :func:`~lightning_sparse.compare.results.is_percent`.
        title: of the plot.
        files: where to save; the ending settles the format.
    """
    drawing = extra("matplotlib.figure", "report").Figure(figsize=(9, 5.5), layout="constrained")
    axes = drawing.subplots()
    known = [row for row in rows if row.values("metric") and row.values("density")]
    percent = is_percent(known, metric)
    scale = 100.0 if percent else 1.0
    titles = list(dict.fromkeys(row.title for row in known if row.method != "dense"))
    for index, row in enumerate(row for row in known if row.method == "dense"):
        mean, deviation = _scaled(row, "metric", scale)
        axes.axhline(mean, color="0.35", linestyle=_ACROSS[index % len(_ACROSS)], linewidth=1.2, label=row.title)
        axes.axhspan(mean - deviation, mean + deviation, color="0.5", alpha=0.15, linewidth=0)
    for index, name in enumerate(titles):
        points = [(_scaled(r, "density", 100), _scaled(r, "metric", scale)) for r in known if r.title == name]
        _curve(axes, sorted(points), name, index)
    _label(axes, [_scaled(row, "density", 100)[0] for row in known if row.method != "dense"])
    axes.set(xlabel="density of the selected weights, % (log scale)", ylabel=f"{metric}, %" if percent else metric)
    axes.set_title(title, fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(file, dpi=130)


def _scaled(row: Row, name: str, scale: float) -> tuple[float, float]:
    """Return mean and deviation of a column, 0 where one value has none."""
    mean, deviation = summarise([scale * value for value in row.values(name)])
    return mean, deviation or 0.0


def _curve(axes: Any, points: Sequence[tuple[tuple[float, float], tuple[float, float]]], name: str, index: int) -> None:
    """Draw one method; deviations that are 0 leave no bar."""
    (x, dx), (y, dy) = (zip(*values, strict=True) for values in zip(*points, strict=True))
    axes.errorbar(
        x,
        y,
        xerr=dx if any(dx) else None,
        yerr=dy if any(dy) else None,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_LINES[index // len(_COLOURS) % len(_LINES)],
        markersize=5,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2.5,
        label=name,
    )


def _label(axes: Any, densities: Sequence[float]) -> None:
    """Label the axis of densities with round percentages around those that there are."""
    positive = [density for density in densities if density > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 100.0)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.4, min(high * 1.4, 130))
    ticks = [tick for tick in _TICKS if low / 1.4 <= tick <= high * 1.4]
    if ticks and math.isfinite(low):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
