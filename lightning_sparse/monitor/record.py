"""What the file and the loggers say of a run: pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sparse.compat.lightning import Trainer
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["batch_size", "described", "metrics", "scalars"]


def described(methods: Sequence[SparseCallback]) -> dict[str, Any] | None:
    """Return name and arguments of a method; of several, their names and the arguments of each."""
    if len(methods) == 1:
        return {"name": type(methods[0]).__name__, "arguments": methods[0].arguments}
    names = [type(method).__name__ for method in methods]
    unique = [f"{name}[{index}]" if names.count(name) > 1 else name for index, name in enumerate(names)]
    arguments = {name: method.arguments for name, method in zip(unique, methods, strict=True)}
    return {"name": " + ".join(names), "arguments": arguments} if methods else None


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what is logged of an epoch's record, by the name it is logged under."""
    found = {
        "density/model": record["density"],
        "density/backward": record["backward_density"],
        "flops/inference": record["inference_flops"],
        "flops/training": record["training_flops"],
        "cost/step_time": record["step_time_s"],
        "cost/peak_memory": record["peak_memory_bytes"],
        "mask/churn": record["churn"],
        "mask/churn_per_update": record["churn_per_update"],
        "mask/exploration": record["exploration"],
        "mask/empty_neurons": record["empty_neurons"],
        "mask/empty_inputs": record["empty_inputs"],
        "mask/shrunk_size": record["shrunk_size"],
    }
    found |= {f"bytes/{name}": count for name, count in record["bytes"].items()}
    for name, layer in record["layers"].items():
        found[f"density/{name}"] = layer["density"]
        found[f"empty_neurons/{name}"] = layer["empty_neurons"]
        found[f"empty_inputs/{name}"] = layer["empty_inputs"]
    found |= {f"threshold/{name}": statistics["mean"] for name, statistics in record["thresholds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def metrics(trainer: Trainer) -> dict[str, float | None]:
    """Return the Trainer's metrics but for this callback's own; JSON has no number for those that are not finite."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "density/model"}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch; None if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := batch_size(part)) is not None), None)
