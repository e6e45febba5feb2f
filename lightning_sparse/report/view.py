"""From a run to what its page shows: texts, tables and figures, and the names of what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_sparse.report import figures
from lightning_sparse.report.runs import Run, Values, known, last, number
from lightning_sparse.report.text import count, is_share, memory, metric_text, moment, operations, seconds, share

__all__ = ["headline", "refuse", "view"]

_STATUS = {
    "finished": "The training ended as planned.",
    "running": "When this page was written the training had not ended: numbers are those of the last whole epoch. "
    "A process that was killed also stays in this state.",
    "interrupted": "The training was interrupted: numbers are those of the last whole epoch before.",
    "failed": "The training stopped with an error: numbers are those of the last whole epoch before.",
}
#: masks or histograms that show before one asks for more
_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """A line of the headline table, and a bar where the run stands in a ratio to its dense twin."""

    label: str
    kind: str  # "", "theoretical", "counted" or "measured"
    dense: str
    sparse: str
    compared: str = ""
    ratio: float | None = None


def step_time(run: Run) -> float | None:
    """Return the median over the epochs of their median step times, in seconds."""
    times = known(run.series("step_time_s"))
    return median(times) if times else None


def peak(run: Run) -> float | None:
    """Return the largest peak memory of all epochs, in bytes."""
    return max(known(run.series("peak_memory_bytes")), default=None)


def held(run: Run) -> float | None:
    """Return the bytes of weights, gradients, optimizer state and what the method holds, at the end."""
    stored = (run.epochs[-1].get("bytes") or {}) if run.epochs else {}
    return float(sum(stored.values())) if stored else None


def nonzero(run: Run) -> tuple[float, float] | None:
    """Return how many parameters are not masked, and how many there are."""
    if not run.epochs:
        return None
    densities = run.epochs[-1]["layers"]
    others = run.record.get("other_parameters") or 0
    sizes = {layer["name"]: layer["size"] for layer in run.layers}
    active = sum(round(size * densities.get(name, {}).get("density", 1.0)) for name, size in sizes.items())
    return active + others, sum(sizes.values()) + others


def choose_metric(run: Run, metric: str | None) -> str | None:
    """Return the metric to draw: the one asked for, else an accuracy, else a loss, first of validation.

    Raises:
        ValueError: no epoch has the one asked for.
    """
    names = run.metrics
    if metric is not None:
        if metric not in names:
            raise ValueError(f"metric must be one that the run logged ({', '.join(names) or 'none'}), got {metric!r}.")
        return metric
    order: list[Callable[[str], bool]] = [
        lambda name: is_share(name) and "val" in name,
        is_share,
        lambda name: "val" in name and "loss" in name,
        lambda name: "loss" in name,
    ]
    return next((name for wanted in order for name in names if wanted(name)), None)


def headline(run: Run, dense: Run | None, metric: str | None) -> list[Row]:
    """Return the table's lines: metrics, first the one that is drawn, densities, operations, memory and time."""
    rows = []
    for name in dict.fromkeys([*([metric] if metric else []), *run.tests, *run.metrics]):
        mine = run.tests.get(name, last(run.metric(name)))
        twin = None if dense is None else dense.tests.get(name, last(dense.metric(name)))
        difference = ""
        if mine is not None and twin is not None:
            percent = is_share(name) and max(mine, twin) <= 1
            difference = f"{100 * (mine - twin):+.2f} points" if percent else f"{mine - twin:+.3g}"
            difference = difference.replace("-", "\u2212", 1)
        rows.append(Row(name, "", metric_text(name, twin), metric_text(name, mine), difference))
    rows.append(Row("density of the selected weights", "", "100 %", share(last(run.series("density")))))
    backward = last(run.series("backward_density"))
    if backward is not None:
        rows.append(Row("density of their gradients", "", "100 %", share(backward)))
    parameters = nonzero(run)
    if parameters is not None:
        active, total = parameters
        rows.append(Row("parameters not masked", "", count(total), count(active), share(active / total)))
    shrunk = last(run.series("shrunk_size"))
    if shrunk is not None:
        rows.append(Row("dense weights without empty neurons and inputs", "counted", "100 %", share(shrunk)))
    rows += [_operations(run, "inference", "dense_forward_flops"), _operations(run, "training", "dense_training_flops")]
    measures = (
        ("tensors of training", "counted", held, memory),
        ("peak memory", "measured", peak, memory),
        ("time of a step", "measured", step_time, seconds),
    )
    for label, kind, read, text in measures:
        mine, twin = read(run), None if dense is None else read(dense)
        ratio = mine / twin if mine is not None and twin else None
        rows.append(Row(label, kind, text(twin), text(mine), "" if ratio is None else f"× {ratio:.3g}", ratio))
    return rows


def _operations(run: Run, what: str, key: str) -> Row:
    """Return the line of theoretical operations: counts if the dense count is known, else shares."""
    part, dense = last(run.series(f"{what}_flops")), number(run.record.get(key))
    of = run.record.get("flops_of")
    label = f"{what} FLOPs" + (f" per {of}" if of else "")
    compared = "" if part is None else f"× {part:.3g}"
    if dense is None:
        return Row(label, "theoretical", "100 %", share(part), compared, part)
    mine = None if part is None else part * dense
    return Row(label, "theoretical", operations(dense), operations(mine), compared, part)


def differences(run: Run, dense: Run) -> list[str]:
    """Return in what the two runs differ, beyond the method, so that a comparison may mislead."""
    found = []
    for key, label in (("module", "module"), ("seed", "seed"), ("hardware", "hardware"), ("versions", "versions")):
        mine, twin = run.record.get(key), dense.record.get(key)
        if isinstance(mine, dict) and isinstance(twin, dict):
            parts = [name for name in {**mine, **twin} if mine.get(name) != twin.get(name)]
            found += [f"{label}, {name}: {mine.get(name)} (dense: {twin.get(name)})" for name in parts]
        elif mine != twin:
            found.append(f"{label}: {mine} (dense: {twin})")
    if len(run.epochs) != len(dense.epochs):
        found.append(f"epochs: {len(run.epochs)} (dense: {len(dense.epochs)})")
    if dense.record["status"] != "finished":
        found.append(f"the dense run is {dense.record['status']}")
    return found


def layer_rows(run: Run) -> list[dict[str, Any]]:
    """Return a line of the layers' table for each, and whether gradients have densities of their own."""
    ends = run.epochs[-1]["layers"] if run.epochs else {}
    rows = []
    for layer in run.layers:
        state = ends.get(layer["name"], {})
        density = number(state.get("density"))
        rows.append(
            {
                "name": layer["name"],
                "shape": " × ".join(map(str, layer["shape"])),
                "density": density,
                "text": share(density),
                "backward": share(number(state.get("backward_density"))),
                "active": "—" if density is None else count(round(density * layer["size"])),
                "size": count(layer["size"]),
                "neurons": count(number(state.get("empty_neurons"))),
                "inputs": count(number(state.get("empty_inputs"))),
            }
        )
    return rows


def epoch_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of epochs."""
    columns: list[tuple[str, Values, Callable[[float | None], str]]] = [
        ("density", run.series("density"), share),
        ("of gradients", run.series("backward_density"), share),
        *((name, run.metric(name), lambda value, name=name: metric_text(name, value)) for name in run.metrics),
        ("inference FLOPs (theoretical)", run.series("inference_flops"), share),
        ("training FLOPs (theoretical)", run.series("training_flops"), share),
        ("step time (measured)", run.series("step_time_s"), seconds),
        ("peak memory (measured)", run.series("peak_memory_bytes"), memory),
        ("mask changed", run.series("churn"), share),
        ("ever active", run.series("exploration"), share),
    ]
    columns = [column for column in columns if known(column[1])]
    head = ["epoch", "step", *(label for label, _, _ in columns)]
    lines = [
        [str(epoch["epoch"] + 1), count(number(epoch.get("step"))), *(text(values[i]) for _, values, text in columns)]
        for i, epoch in enumerate(run.epochs)
    ]
    return head, lines


def missing_parts(run: Run, metric: str | None) -> list[str]:
    """Name what the run did not record."""
    record = run.record
    found = []
    if not run.epochs:
        found.append("epochs: none was completed, so there is no density, metric, time or mask to show")
    else:
        if metric is None:
            found.append("an accuracy or a loss: none was logged with self.log in an epoch")
        labels = {
            "inference_flops": "theoretical FLOPs of inference",
            "training_flops": "theoretical FLOPs of training",
            "step_time_s": "measured step times",
            "peak_memory_bytes": "measured peak memory",
        }
        found += [text for key, text in labels.items() if not known(run.series(key))]
        if run.method is not None and not record.get("masks"):
            found.append("pictures of the masks")
    found += [
        text
        for key, text in (("seed", "the seed"), ("versions", "versions"), ("hardware", "hardware"))
        if record.get(key) is None
    ]
    if run.config is None:
        found.append("config.yaml, which runs of the command line (LightningCLI) leave beside sparsity.json")
    return found


def refuse(run: Run, dense: Run | None, metric: str | None) -> None:
    """Raise if a page on these runs cannot show what is asked for.

    Raises:
        ValueError: the run given as dense has a method, or no epoch has the metric.
    """
    if dense is not None and dense.method is not None:
        raise ValueError(f"dense must be a run without a method, got one with {dense.method} in {dense.folder}.")
    choose_metric(run, metric)


def view(run: Run, dense: Run | None, metric: str | None) -> dict[str, Any]:
    """Return what the template shows of runs that ``refuse`` has let pass."""
    metric = choose_metric(run, metric)
    status = run.record["status"]
    module = (run.record.get("module") or "an unnamed module").rsplit(".", 1)[-1]
    rows = headline(run, dense, metric)
    parts = [
        figures.density_chart(run),
        figures.metric_chart(run, dense, metric),
        figures.tradeoff_chart(run, dense, metric),
    ]
    movement = figures.movement_chart(run)
    bars = [row for row in rows if row.ratio is not None]
    head, lines = epoch_table(run)
    method = run.record.get("method") or {}
    return {
        "title": f"{run.method or 'Dense training'} on {module}",
        "folder": str(run.folder),
        "status": status if status in _STATUS else "unknown",
        "status_text": _STATUS.get(status, f"The file gives the state {status!r}, which this version does not know."),
        "facts": {
            "module": run.record.get("module") or "unknown",
            "epochs": len(run.epochs),
            "seed": "unknown" if run.record.get("seed") is None else run.record["seed"],
            "started": moment(run.record.get("started")),
            "last update": moment(run.record.get("updated")),
            "wall time": seconds(number(run.record.get("wall_time_s"))),
        },
        "cards": cards(run, rows, metric),
        "method": run.method,
        "dense": None if dense is None else str(dense.folder),
        "differences": [] if dense is None else differences(run, dense),
        "rows": rows,
        "bars": bars,
        "widest": max([1.0, *(row.ratio for row in bars if row.ratio is not None)]),
        "charts": parts + ([movement] if movement is not None else []),
        "layers": layer_rows(run),
        "backward": bool(known(run.series("backward_density"))),
        "masks": figures.pictures(run),
        "thresholds": figures.threshold_charts(run),
        "shown": _SHOWN,
        "epoch_head": head,
        "epoch_lines": lines,
        "missing": missing_parts(run, metric),
        "arguments": method.get("arguments") or {},
        "versions": run.record.get("versions") or {},
        "hardware": run.record.get("hardware") or {},
        "config": run.config,
    }


def cards(run: Run, rows: Sequence[Row], metric: str | None) -> list[tuple[str, str, str]]:
    """Return the key figures: label, value and a word on it."""
    by_label = {row.label: row for row in rows}
    found = []
    if metric is not None and (row := by_label.get(metric)):
        found.append((metric, row.sparse, f"{row.compared} against dense" if row.compared else "last epoch"))
    row = by_label["density of the selected weights"]
    parameters = nonzero(run)
    found.append(("density", row.sparse, "" if parameters is None else f"{count(parameters[0])} parameters left"))
    part = last(run.series("inference_flops"))
    found.append(("inference FLOPs", share(part), "of dense; theoretical"))
    for label in ("time of a step", "peak memory"):
        row = by_label[label]
        found.append((label, row.sparse, f"{row.compared} dense; measured" if row.compared else "measured"))
    return found
