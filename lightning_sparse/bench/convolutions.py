"""Sparse convolutions beside dense ones and those of SparseProp, if it is installed, layer by layer."""

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import hardware, middle
from lightning_sparse.kernels.products import candidates
from lightning_sparse.rules import sampling
from lightning_sparse.rules.budgets import budget
from lightning_sparse.storage import SparseConv2d

__all__ = ["convolutions"]

#: channels, side of the image; a line as in VGG-16 and ResNet-18 for CIFAR
_LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2))


def _pass(layer: nn.Module, x: Tensor, delta: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(delta)

    return step


def _layers(channels: int, sparsity: float, device: str) -> dict[str, nn.Module]:
    """Return one convolution in all forms: dense, sparse by each backend, and SparseProp's."""
    torch.manual_seed(0)
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device)
    size = dense.weight.numel()
    positions = sampling.distinct(budget(sparsity, size), size, torch.default_generator).to(device)
    layers: dict[str, nn.Module] = {"dense": dense}
    for name in candidates(torch.device(device), torch.float32):
        sparse = SparseConv2d.from_dense(dense, positions)
        sparse.backend = name
        layers[name] = sparse
    try:
        other: Any = importlib.import_module("sparseprop.modules")
        importlib.import_module("sparseprop").set_num_threads(torch.get_num_threads())
        layers["sparseprop"] = other.SparseConv2d.from_dense(SparseConv2d.from_dense(dense, positions).to_dense())
    except ImportError:
        pass
    return layers


def convolutions(arguments: argparse.Namespace) -> None:
    """Print the time of a forward and backward pass of sparse 3 x 3 convolutions over that of dense ones, in turn."""
    device = arguments.device
    print(f"3 x 3, batch {arguments.batch}, {hardware(device)}; forward and backward, over dense")
    for sparsity in map(float, (arguments.sparsities or "0.9,0.98").split(",")):
        for channels, side in _LAYERS:
            x = torch.randn(arguments.batch, channels, side, side, device=device, requires_grad=True)
            delta = torch.randn(arguments.batch, channels, side, side, device=device)
            passes = {name: _pass(layer, x, delta) for name, layer in _layers(channels, sparsity, device).items()}
            times: dict[str, list[float]] = {name: [] for name in passes}
            for round_ in range(arguments.rounds + 1):
                for name, step in passes.items():
                    taken = seconds(step, 1, device)
                    if round_:  # the first one may compile
                        times[name].append(taken)
            base = statistics.median(times["dense"])
            shown = [f"{name} {middle([t / base for t in ours])}" for name, ours in times.items() if name != "dense"]
            layer = f"{channels} channels, {side} x {side}:"
            print(f"{sparsity:<5g} {layer:24s} dense {1e3 * base:.1f} ms  " + "  ".join(shown), flush=True)
