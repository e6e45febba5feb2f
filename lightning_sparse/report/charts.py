"""Charts as inline SVG: matplotlib draws, the page's style sheet colours, so that one picture suits light and dark."""

import base64
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lightning_sparse.compat.extras import extra

__all__ = [
    "COLOURS",
    "STYLES",
    "Line",
    "Style",
    "draw_lines",
    "histogram",
    "lines",
    "log_ticks",
    "mask",
    "panels",
    "paths",
]

#: Okabe and Ito's, told apart with any colour vision
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_TEXT, _MUTED, _RULE = "#101010", "#808080", "#e0e0e0"
_NAMES = ("--blue", "--orange", "--green", "--pink", "--red", "--sky", "--text", "--muted", "--rule")
#: what matplotlib writes -> the style sheet's variable
_VARIABLES = dict(zip((*COLOURS, _TEXT, _MUTED, _RULE), _NAMES, strict=True))
_DASHES = ((), (5, 1.5), (2, 1), (6, 1.5, 1.5, 1.5), (1, 1), (8, 2))


@dataclass(frozen=True)
class Style:
    """How a line looks: colour, and dashes in line widths, so that colour alone tells nothing."""

    colour: str
    dashes: tuple[float, ...] = ()
    width: float = 1.8

    @property
    def variable(self) -> str:
        """The style sheet's variable of the colour."""
        return _VARIABLES[self.colour]


STYLES = tuple(map(Style, COLOURS, _DASHES))
ALL = Style(_TEXT, width=2.6)
OTHERS = Style(_MUTED, width=0.6)
DENSE = Style(_MUTED, (4, 2), 1.6)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend; empty: not there.
        values: one an epoch; None leaves a gap.
        style: how it looks.
        note: what the legend says of it, such as its last value.
    """

    label: str
    values: Sequence[float | None]
    style: Style
    note: str = ""


def lines(
    epochs: Sequence[int],
    drawn: Sequence[Line],
    *,
    alt: str,
    ylabel: str,
    percent: bool = True,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return a chart of values over the epochs; see :func:`draw_lines`."""
    figure, (axes,) = panels()
    draw_lines(axes, epochs, drawn, ylabel=ylabel, percent=percent, log=log, limits=limits)
    return _svg(figure, alt)


def draw_lines(
    axes: Any,
    epochs: Sequence[int],
    drawn: Sequence[Line],
    *,
    ylabel: str,
    percent: bool = True,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw values over the epochs; ``limits`` are the upright axis's, None: what is drawn."""
    for line in drawn:
        numbers = [float("nan") if value is None else value for value in line.values]
        label = f"{line.label}  {line.note}"  # of a legend, which the page has beside the picture
        axes.plot(epochs, numbers, label=label, **_look(line.style, len(epochs)))
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(extra("matplotlib.ticker", "report").MaxNLocator(7, integer=True))
    _scale(axes, "y", percent, log)
    if limits is not None:
        axes.set_ylim(limits)


def paths(
    drawn: Sequence[tuple[Sequence[float], Sequence[float], Style]],
    level: float | None,
    *,
    alt: str,
    xlabel: str,
    ylabel: str,
    percent: bool,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return a chart of one value against a share: a path an epoch a dot, its end marked, and the twin's level."""
    figure, (axes,) = panels()
    if level is not None:
        axes.axhline(level, color=DENSE.colour, linewidth=DENSE.width, dashes=DENSE.dashes)
    for x, y, style in drawn:
        axes.plot(x, y, color=style.colour, linewidth=1, alpha=0.6)
        axes.scatter(x[:-1], y[:-1], s=9, color=style.colour, linewidths=0)
        axes.scatter(x[-1:], y[-1:], s=64, color=style.colour, marker="D", zorder=3)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.08)
    _scale(axes, "x", True, True)
    _scale(axes, "y", percent, False)
    if limits is not None:
        axes.set_ylim(limits)
    return _svg(figure, alt)


def histogram(counts: Sequence[float], edges: Sequence[float], *, alt: str) -> str:
    """Return a small histogram."""
    figure, (axes,) = panels(size=(3.1, 1.7))
    axes.stairs(counts, edges, fill=True, color=STYLES[0].colour)
    axes.locator_params(axis="both", nbins=4)
    axes.set_ylabel("thresholds")
    return _svg(figure, alt)


def mask(density: Sequence[Sequence[float]]) -> tuple[str, float]:
    """Return a picture of a mask as a data URI, one pixel a cell, and the density that is white (0 is black)."""
    top = max((value for row in density for value in row), default=0.0) or 1.0
    stream = io.BytesIO()
    image = extra("matplotlib.image", "report")
    image.imsave(stream, density, cmap="gray", vmin=0, vmax=top, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), top


# ---------------------------------------------------------------------- how they look


def panels(count: int = 1, size: tuple[float, float] = (4.6, 2.9)) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes, side by side."""
    figure = extra("matplotlib.figure", "report").Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, count, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(_MUTED)
        axes.grid(color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(color=_MUTED, labelcolor=_TEXT, which="both")
        axes.xaxis.label.set_color(_TEXT)
        axes.yaxis.label.set_color(_TEXT)
    return figure, row


def _look(style: Style, count: int) -> dict[str, Any]:
    look: dict[str, Any] = {"color": style.colour, "linewidth": style.width, "marker": "o" if count < 6 else None}
    return {**look, "markersize": 4, **({"dashes": style.dashes} if style.dashes else {})}


def _scale(axes: Any, name: str, percent: bool, log: bool) -> None:
    """Label the axis "x" or "y" with shares in percent or with plain numbers, linear or logarithmic."""
    ticker = extra("matplotlib.ticker", "report")
    axis = axes.xaxis if name == "x" else axes.yaxis
    if log:
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_locator(ticker.FixedLocator(log_ticks(*axis.get_view_interval())))
        axis.set_minor_locator(ticker.NullLocator())
    if percent or log:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %" if percent else f"{value:g}")


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` round numbers from ``low`` to ``high``: a logarithmic axis has room for their labels.

    >>> log_ticks(0.02, 0.3), log_ticks(1e-6, 1.0)
    ([0.02, 0.05, 0.1, 0.2], [1e-06, 0.0001, 0.01, 1.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    finest = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    coarser = ([float(f"1e{power}") for power in powers if power % apart == 0] for apart in range(1, len(powers) + 1))
    for ticks in (finest, *coarser):
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) <= most:
            break
    if len(within) > 1:
        return within
    linear = extra("matplotlib.ticker", "report").MaxNLocator(4).tick_values(low, high)
    return [float(tick) for tick in linear if low <= tick <= high]


def _svg(figure: Any, alt: str) -> str:
    """Return the figure as an element of HTML: text stays text, colours are variables, ids differ between charts."""
    stream = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report"}
    with extra("matplotlib", "report").rc_context(settings):
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _coloured(found[0]), text)
    prefix = f"c{zlib.crc32((alt + text).encode()):08x}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None  # matplotlib always writes one
    return f'<svg {head[0]} role="img" aria-label="{escape(alt)}"' + text[text.index(">") :].rstrip()


def _coloured(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour
