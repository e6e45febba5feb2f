"""Methods, networks and runs with ``storage="sparse"`` that several tests share."""

import torch
from helpers import (
    Lit,
    fit,
    loader,
    mlp,
    seeded,
)
from torch import nn

from lightning_sparse import DSR, GGR, ITOP, MEST, SET, FixedMask, MemoryEfficientDST, RandomPruning, RigL, SRigL

METHODS = {
    "SET": lambda **kw: SET(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "SET by epoch": lambda **kw: SET(**{"sparsity": 0.8, **kw}),
    "MemoryEfficientDST random": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "heuristic": "random", "subset_multiplier": 2, "update_every": 7, "stop_at": 0.9, **kw}
    ),
    "MemoryEfficientDST grabo": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "update_every": 7, "stop_at": 0.9, "min_layer_density": 0.05, **kw}
    ),
    "MemoryEfficientDST synflow": lambda **kw: MemoryEfficientDST(
        **{"sparsity": 0.8, "heuristic": "synflow", "update_every": 7, "stop_at": 0.9, **kw}
    ),
    "RigL": lambda **kw: RigL(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "SRigL": lambda **kw: SRigL(**{"sparsity": 0.8, "min_salient": 0.95, "update_every": 7, **kw}),
    "GGR": lambda **kw: GGR(
        **{"sparsity": 0.8, "drop_fraction": 0.3, "update_every": 7, "stop_at": 0.9, "min_layer_density": 0.05, **kw}
    ),
    "ITOP gradient": lambda **kw: ITOP(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "ITOP random": lambda **kw: ITOP(**{"sparsity": 0.8, "growth": "random", "update_every": 7, **kw}),
    "MEST": lambda **kw: MEST(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "MEST soft bound": lambda **kw: MEST(**{"sparsity": 0.8, "soft_bound": True, "update_every": 7, **kw}),
    "DSR": lambda **kw: DSR(**{"sparsity": 0.8, "init_threshold": 0.05, "update_every": 7, **kw}),
    "RandomPruning": lambda **kw: RandomPruning(**{"sparsity": 0.8, **kw}),
    "FixedMask": lambda **kw: FixedMask(**{"sparsity": 0.8, "initial": "magnitude", **kw}),
}
UPDATES = [name for name in METHODS if METHODS[name]().moves]
RESIZES = [name for name in METHODS if METHODS[name]().resizes]


def images(dtype=torch.float32):
    return nn.Sequential(
        nn.Unflatten(1, (4, 3, 1)),
        nn.Conv2d(4, 6, (3, 1), padding="same", groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, (2, 1), stride=(2, 1), padding=(1, 0), bias=False),
        nn.ReLU(),  # no batch-norm, which divides rounding errors by the variance of channels that have none
        nn.Flatten(),
        nn.Linear(16, 4),
    ).to(dtype)


def tokens(dtype=torch.float32):
    """A linear layer whose inputs have three dimensions."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(24, 4)
    ).to(dtype)


NETWORKS = {"mlp": mlp, "images": images}
OPTIMIZERS = {
    "momentum": None,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def run(callback, network=mlp, optimizer=None, **kwargs):
    module = seeded(lambda: Lit(network(torch.float64), optimizer))
    return fit(callback, module, loader(120, dtype=torch.float64), **{"precision": "64-true", **kwargs})


class OnMeta(Lit):
    """Has no weights before configure_model, and never a dense one."""

    def __init__(self, bias=True):
        super().__init__(nn.Identity())
        self.bias = bias

    def configure_model(self):
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(12, 300, self.bias), nn.ReLU(), nn.Linear(300, 4))


TIMES = {"numba": 0.5, "torch": 0.4, "dense": 1.0}


def measured(times):
    """What stands for a measurement: the same times for all layers, or those of each input width."""

    def found(layers, inputs, names, context):
        return {
            name: {way: t for way, t in (times(layer) if callable(times) else times).items() if way in names(layer)}
            for name, layer in layers.items()
            if name in inputs
        }

    return found
