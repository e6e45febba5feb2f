"""Figures for TensorBoard: densities and masks."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import Trainer

__all__ = ["draw", "painters"]


def painters(trainer: Trainer) -> list[Any]:
    """Return what of the Trainer's loggers takes figures: TensorBoard's writers."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if hasattr(experiment, "add_figure")]


def draw(densities: Mapping[str, float], pictures: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the densities of the layers, and the masks: the darker a cell, the denser.

    Args:
        densities: of each layer.
        pictures: of each layer's mask, as ``layer.picture`` returns them.
    """
    matplotlib = extra("matplotlib.figure", "report")
    names = list(densities)
    bars = matplotlib.Figure(figsize=(6, 1 + 0.3 * len(names)), layout="constrained")
    axes = bars.subplots()
    labels = [f"{density:.3g}" for density in densities.values()]
    axes.bar_label(axes.barh(names, list(densities.values())), labels, padding=3)
    axes.set(xlim=(0, 1.15), xlabel="density", title="Density of each layer")
    axes.invert_yaxis()
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    masks = matplotlib.Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    for place, name in enumerate(names):
        axes = masks.add_subplot(rows, columns, place + 1)
        picture = pictures[name]
        extent = (0, picture["columns"], picture["rows"], 0)
        axes.imshow(picture["cells"].numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", extent=extent)
        axes.set(title=name, xlabel="inputs", ylabel="neurons")
    return {"density": bars, "masks": masks}
