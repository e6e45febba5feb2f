"""Records of runs as SparsityMonitor writes them, made by hand."""

import json
import math
from pathlib import Path
from typing import Any

SHAPES = {"net.fc1.weight": [30, 64], "net.fc2.weight": [20, 30], "net.fc3.weight": [10, 20]}


def record(epochs: int = 8, method: str | None = "DFBST", shapes: dict[str, list[int]] = SHAPES) -> dict[str, Any]:
    """Return a record whose densities fall from 1 at a rate of each layer's own."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}

    def state(epoch: int) -> dict[str, Any]:
        rates = {name: (0.15 + 0.3 / (1 + index)) if method else 0.0 for index, name in enumerate(shapes)}
        layers = {
            name: {
                "density": max(round(sizes[name] * math.exp(-rate * (epoch + 1))), 1) / sizes[name],
                "backward_density": max(0.2, 1 - 0.1 * epoch) if method == "DFBST" else None,
                "empty_neurons": epoch if method else 0,
                "empty_inputs": 2 * epoch if method else 0,
                "shrunk_size": sizes[name] - (epoch if method else 0),
            }
            for name, rate in rates.items()
        }
        density = sum(layers[name]["density"] * size for name, size in sizes.items()) / sum(sizes.values())
        thresholds = {
            name: {
                "min": 0.0,
                "mean": 0.05,
                "max": 0.1,
                "counts": [1, 4, 9, 5, 1],
                "edges": [0, 0.02, 0.04, 0.06, 0.08, 0.1],
            }
            for name in shapes
        }
        return {
            "epoch": epoch,
            "step": 100 * (epoch + 1),
            "density": density,
            "backward_density": max(0.2, 1 - 0.1 * epoch) if method == "DFBST" else None,
            "layers": layers,
            "metrics": {
                "train_loss": 2.3 * math.exp(-0.4 * epoch),
                "val_acc": 0.97 - 0.4 * math.exp(-0.7 * epoch) - (0.005 if method else 0),
                "sparsity/model": 1 - density,
            },
            "shrunk_size": 1 - 0.001 * epoch if method else 1.0,
            "inference_flops": density,
            "training_flops": (1 + density) / 2,
            "step_time_s": 0.0021 if method else 0.0019,
            "peak_memory_bytes": 500 * 2**20 if method else 490 * 2**20,
            "bytes": {"weights": 11120, "gradients": 11120, "method": 13000 if method else 0},
            "churn": None,
            "exploration": None,
            "thresholds": thresholds if method == "DFBST" else {},
        }

    masks = {
        name: {
            "rows": shape[0],
            "columns": math.prod(shape[1:]),
            "density": [
                [float((7 * i + 3 * j * j) % 11 < 2) for j in range(min(math.prod(shape[1:]), 128))]
                for i in range(min(shape[0], 128))
            ],
        }
        for name, shape in shapes.items()
    }
    return {
        "format": 1,
        "status": "finished",
        "started": "2026-11-21T08:00:00+00:00",
        "updated": "2026-11-21T08:02:05+00:00",
        "wall_time_s": 125.0,
        "method": {"name": method, "arguments": {"alpha": 0.0005, "beta": 0.01}} if method else None,
        "module": "lightning_sparse.zoo.models.lenet.LeNet300",
        "seed": 0,
        "versions": {"lightning_sparse": "0.1.0", "torch": "2.9.0", "lightning": "2.6.0", "python": "3.11.9"},
        "hardware": {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 1, "processes": 1, "precision": "32-true"},
        "layers": [
            {
                "name": name,
                "shape": shape,
                "size": sizes[name],
                "neurons": shape[0],
                "inputs": shape[1],
                "dense_forward_flops": 2 * sizes[name],
            }
            for name, shape in shapes.items()
        ],
        "other_parameters": 60,
        "flops_of": "example",
        "dense_forward_flops": sum(2 * size for size in sizes.values()),
        "dense_training_flops": sum(6 * size for size in sizes.values()),
        "epochs": [state(epoch) for epoch in range(epochs)],
        "masks": masks if method and epochs else {},
    }


def save(folder: Path, contents: dict[str, Any]) -> Path:
    """Write a record into a run's directory, and return the directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sparsity.json").write_text(json.dumps(contents), encoding="utf-8")
    return folder
