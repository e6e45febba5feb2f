"""What the file and the loggers say of a run: pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sparse.accounting import flops
from lightning_sparse.accounting.flops import Flops
from lightning_sparse.accounting.masks import spread
from lightning_sparse.compat.lightning import Trainer
from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.shards import local
from lightning_sparse.monitor.layer import COUNTS, Layer
from lightning_sparse.monitor.looks import Looks
from lightning_sparse.rules.parts import part_of
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["batch_size", "densities", "described", "metrics", "of_layers", "scalars", "sizes", "thresholds"]


def described(methods: Sequence[SparseCallback]) -> dict[str, Any] | None:
    """Return name and arguments of a method; of several, their names and the arguments of each."""
    if len(methods) == 1:
        return {"name": type(methods[0]).__name__, "arguments": methods[0].arguments}
    names = [type(method).__name__ for method in methods]
    unique = [f"{name}[{index}]" if names.count(name) > 1 else name for index, name in enumerate(names)]
    arguments = {name: method.arguments for name, method in zip(unique, methods, strict=True)}
    return {"name": " + ".join(names), "arguments": arguments} if methods else None


def sizes(layers: Sequence[Layer], parameters: int, dense: Mapping[str, Flops], examples: int | None) -> dict[str, Any]:
    """Return what the file says of the weights.

    Args:
        layers: the selected ones.
        parameters: number of all parameters of the module.
        dense: the operations of a dense step, by name of weight; empty: not counted.
        examples: number of examples that they are of; None: they are told of the batch.
    """

    def of_one(operations: float) -> int | None:
        return round(operations / (examples or 1)) if dense else None

    return {
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "size": layer.size,
                "neurons": layer.neurons,
                "inputs": layer.inputs,
                **{f"dense_{pass_}_flops": of_one(n) for pass_, n in vars(dense.get(layer.name, Flops())).items()},
            }
            for layer in layers
        ],
        "other_parameters": parameters - sum(layer.size for layer in layers),
        "dense_forward_flops": of_one(round(flops.inference(dense, {}))),
        "dense_training_flops": of_one(round(flops.training(dense, {}, {}))),
    }


def of_layers(looks: Looks) -> dict[str, Any]:
    """Return what the latest look tells of each layer, and of all of them as shares."""
    layers = {
        layer.name: {
            "density": looks.density.get(layer.name, 1.0),
            "backward_density": looks.gradient_density.get(layer.name, 1.0),
            **{key: looks.pictures[layer.name][key] for key in COUNTS},
        }
        for layer in looks.layers
    }
    weights = {layer.name: layer.size for layer in looks.layers}

    def mean(key: str) -> float:
        total: float = sum(layers[name][key] * size for name, size in weights.items())
        return total / max(sum(weights.values()), 1)

    def share(key: str, totals: Sequence[int]) -> float:
        return float(sum(layer[key] for layer in layers.values())) / max(sum(totals), 1)

    return {
        "density": mean("density"),
        "backward_density": mean("backward_density"),
        "layers": layers,
        "empty_neurons": share("empty_neurons", [layer.neurons for layer in looks.layers]),
        "empty_inputs": share("empty_inputs", [layer.inputs for layer in looks.layers]),
        "shrunk_size": share("shrunk_size", list(weights.values())),
    }


def thresholds(methods: Sequence[SparseCallback]) -> dict[str, Any]:
    """Return statistics of what ``|W|`` is compared with in each layer, where a method has thresholds."""
    found = {}
    for name, tau in ((n, t) for method in methods for n, t in method.effective_thresholds.items()):
        here, part = local(tau), part_of(tau)
        if part.all(bool(here.isfinite().all())):
            found[name] = spread(here, part=part)
    return found


def scalars(record: Mapping[str, Any], layers: bool = True) -> dict[str, float]:
    """Return what is logged of an epoch's record, by the name it is logged under.

    Densities are not among them: a method logs its sparsities itself.

    Args:
        record: of the epoch.
        layers: whether values of single layers are among them.
    """
    found = {
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
    if layers:
        for name, layer in record["layers"].items():
            found[f"empty_neurons/{name}"] = layer["empty_neurons"]
            found[f"empty_inputs/{name}"] = layer["empty_inputs"]
        found |= {f"threshold/{name}": statistics["mean"] for name, statistics in record["thresholds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def densities(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the densities of an epoch's record: of all selected weights, of their gradients, and of each layer."""
    layers = {f"density/{name}": layer["density"] for name, layer in record["layers"].items()}
    return {"density/model": record["density"], "density/backward": record["backward_density"], **layers}


def metrics(trainer: Trainer) -> dict[str, float | None]:
    """Return the Trainer's metrics but for this callback's own; JSON has no number for those that are not finite."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "density/model"}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch; None if there is none."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim), None)
