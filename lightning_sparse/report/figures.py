"""The page's figures: what is drawn of a run, with legend, caption and words for those who do not see it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_sparse.report import charts
from lightning_sparse.report.runs import Run, Values, known, last, number
from lightning_sparse.report.text import count, is_share, metric_text, plain, share

__all__ = [
    "Part",
    "Picture",
    "density_chart",
    "metric_chart",
    "movement_chart",
    "numbers",
    "pictures",
    "settled",
    "threshold_charts",
    "tradeoff_chart",
]

#: how many layers get a line of their own colour
_COLOURED = len(charts.STYLES)


@dataclass(frozen=True)
class Part:
    """A chart with its legend; a chart that cannot be drawn says what is missing."""

    title: str
    svg: str = ""
    legend: Sequence[charts.Line] = ()
    caption: str = ""
    missing: str = ""


def numbers(run: Run) -> list[int]:
    """Return the epochs' numbers, counted from 1."""
    return [epoch["epoch"] + 1 for epoch in run.epochs]


def density_chart(run: Run) -> Part:
    """Draw the density of each layer over the epochs."""
    title = "Density of each layer"
    names = [layer["name"] for layer in run.layers]
    if not run.epochs or run.method is None:
        return Part(title, missing="no whole epoch" if not run.epochs else "a dense run, nothing is masked")
    values = {n: [number(epoch["layers"].get(n, {}).get("density")) for epoch in run.epochs] for n in names}
    drawn = []
    if len(names) > _COLOURED:
        order = sorted(names, key=lambda name: last(values[name]) or 0.0, reverse=True)
        named = order[: _COLOURED // 2] + order[-(_COLOURED // 2) :]
        drawn = [charts.Line("", values[name], charts.OTHERS) for name in names if name not in named]
        caption = f"The three densest and three sparsest of {len(names)} layers are named; the others are thin lines."
    else:
        named, caption = names, ""
    legend = [
        charts.Line(name, values[name], style, share(last(values[name])))
        for name, style in zip(named, charts.STYLES, strict=False)
    ]
    total = run.series("density")
    legend.append(charts.Line("all selected weights", total, charts.ALL, share(last(total))))
    if known(run.series("backward_density")):
        backward = run.series("backward_density")
        legend.append(charts.Line("their gradients", backward, charts.DENSE, share(last(backward))))
    lowest = min((v for line in [*drawn, *legend] for v in known(list(line.values)) if v > 0), default=1.0)
    zero = any(v == 0 for line in [*drawn, *legend] for v in known(list(line.values)))
    caption += " A layer at 0 % is below a logarithmic axis." if zero and lowest < 0.2 else ""
    alt = "Density over the epochs, at the end: " + ", ".join(f"{line.label} {line.note}" for line in legend) + "."
    svg = charts.lines(numbers(run), [*drawn, *legend], alt=alt, ylabel="weights not masked", log=lowest < 0.2)
    return Part(title, svg, legend, caption.strip())


def metric_chart(run: Run, dense: Run | None, metric: str | None) -> Part:
    """Draw the metric over the epochs, the dense run's beside it."""
    if metric is None or not known(run.metric(metric)):
        return Part("Accuracy over the epochs", missing="no accuracy or loss was logged")
    title = f"{metric} over the epochs"
    legend = [charts.Line(run.method or "dense", run.metric(metric), charts.STYLES[0])]
    if dense is not None and known(dense.metric(metric)):
        length = len(run.epochs)
        twin = (dense.metric(metric) + [None] * length)[:length]
        legend.append(charts.Line("dense", twin, charts.DENSE))
    legend = [charts.Line(i.label, i.values, i.style, metric_text(metric, last(list(i.values)))) for i in legend]
    alt = f"{title}, at the end: " + ", ".join(f"{line.label} {line.note}" for line in legend) + "."
    limits, caption = settled([list(line.values) for line in legend])
    svg = charts.lines(numbers(run), legend, alt=alt, ylabel=metric, percent=is_share(metric), limits=limits)
    return Part(title, svg, legend, caption)


def settled(drawn: Sequence[Values]) -> tuple[tuple[float, float] | None, str]:
    """Return limits of the axis without the first tenth of the epochs, and the words to say so; None: all fit in.

    >>> settled([[0.1, *[0.9 + 0.01 * epoch for epoch in range(9)]]])[0]
    (0.892, 0.988)
    """
    skipped = max(map(len, drawn)) // 10
    early = [value for values in drawn for value in known(values[:skipped])]
    late = [value for values in drawn for value in known(values[skipped:])]
    if not early or not late:
        return None, ""
    low, high = min(late), max(late)
    margin = 0.1 * (high - low) or 0.01 * abs(high) or 0.01
    if low - margin <= min(early) and max(early) <= high + margin:
        return None, ""
    epochs = "The first epoch" if skipped == 1 else f"Of the first {skipped} epochs some"
    return (round(low - margin, 12), round(high + margin, 12)), f"{epochs} may lie outside the axis."


def tradeoff_chart(run: Run, dense: Run | None, metric: str | None) -> Part:
    """Draw the metric against the density, a dot an epoch."""
    title = f"{metric or 'Accuracy'} against density"
    if run.method is None:
        return Part(title, missing="a dense run, the density does not change")
    pairs = [] if metric is None else list(zip(run.series("density"), run.metric(metric), strict=True))
    both = [(x, y) for x, y in pairs if x and y is not None]
    if metric is None or not both:
        return Part(title, missing="no accuracy or loss was logged")
    level = last(dense.metric(metric)) if dense is not None else None
    (first_x, first_y), (x, y) = both[0], both[-1]
    legend = [charts.Line(run.method, [], charts.STYLES[0], f"{metric_text(metric, y)} at {share(x)}")]
    if level is not None:
        legend.append(charts.Line("dense, at the end", [], charts.DENSE, metric_text(metric, level)))
    start = f"{metric_text(metric, first_y)} at density {share(first_x)}"
    end = f"{metric_text(metric, y)} at density {share(x)}"
    alt = f"{metric} against density, one dot per epoch: from {start} to {end}."
    xs, ys = zip(*both, strict=True)
    limits, caption = settled([list(ys), [level] * len(ys)])
    svg = charts.paths(
        [(xs, ys, charts.STYLES[0])],
        level,
        alt=alt,
        xlabel="density of the selected weights",
        ylabel=metric,
        percent=is_share(metric),
        limits=limits,
    )
    return Part(title, svg, legend, f"One dot per epoch; the diamond is the last epoch. {caption}".rstrip())


def movement_chart(run: Run) -> Part | None:
    """Draw the share of connections that changed, and of those ever active; None: neither is known."""
    churn, exploration = run.series("churn"), run.series("exploration")
    every = known(exploration) != [] and min(known(exploration)) == 1
    legend = []
    if known(churn):
        legend.append(charts.Line("changed in the epoch", churn, charts.STYLES[0], share(last(churn))))
    if known(exploration) and not every:
        legend.append(
            charts.Line("active at some time so far", exploration, charts.STYLES[1], share(last(exploration)))
        )
    if not legend or run.method is None:
        return None
    alt = "Movement of the masks, at the end: " + ", ".join(f"{line.label} {line.note}" for line in legend) + "."
    svg = charts.lines(numbers(run), legend, alt=alt, ylabel="share of the connections")
    caption = "Every connection was active at some time of the first epoch." if every else ""
    return Part("Movement of the masks", svg, legend, caption)


def threshold_charts(run: Run) -> list[Part]:
    """Draw a histogram of the thresholds of each layer at the end; empty: the method has none."""
    found = (run.epochs[-1].get("thresholds") or {}) if run.epochs else {}
    parts = []
    for name, stats in found.items():
        low, mean, high = (number(stats.get(key)) for key in ("min", "mean", "max"))
        text = f"from {plain(low)} to {plain(high)}, mean {plain(mean)}"
        if not stats.get("counts"):
            parts.append(Part(name, missing="the histogram was not recorded"))
        elif low == high:
            one = sum(stats["counts"]) == 1
            parts.append(Part(name, caption=f"{'One threshold' if one else 'All thresholds'}: {plain(mean)}"))
        else:
            svg = charts.histogram(stats["counts"], stats["edges"], alt=f"Thresholds of {name}, {text}.")
            parts.append(Part(name, svg, caption=text))
    return parts


@dataclass(frozen=True)
class Picture:
    """A mask as a picture."""

    name: str
    source: str
    ratio: float  # width to height
    alt: str
    caption: str


def pictures(run: Run) -> list[Picture]:
    """Return the masks of the last state, as in GGR's Figure 3: white is active."""
    found = []
    sizes = {layer["name"]: layer for layer in run.layers}
    ends = run.epochs[-1]["layers"] if run.epochs else {}
    for name, picture in (run.record.get("masks") or {}).items():
        rows, columns, cells = picture["rows"], picture["columns"], picture["density"]
        source, top = charts.mask(cells)
        state, layer = ends.get(name, {}), sizes.get(name, {})
        exact = len(cells) == rows and len(cells[0]) == columns
        brightest = "all" if top == 1 else share(top)
        what = (
            "a pixel a weight" if exact else f"a pixel averages a block of weights, white: {brightest} of them active"
        )
        empty = [
            f"{count(number(state[f'empty_{units}']))} of {count(layer[units])} {units} empty"
            for units in ("neurons", "inputs")
            if state.get(f"empty_{units}") is not None and units in layer
        ]
        size = f"{count(rows)} × {count(columns)}"
        parts = [f"{share(number(state.get('density')))} active", *empty]
        found.append(
            Picture(
                name,
                source,
                min(max(columns / rows, 0.8), 2.5),
                f"Mask of {name}, {rows} neurons by {columns} inputs: {', '.join(parts)}.",
                f"{size}; {what}. {', '.join(parts)}.",
            )
        )
    return found
