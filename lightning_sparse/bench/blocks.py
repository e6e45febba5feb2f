"""Linear layers of blocks beside dense ones, and beside layers that hold the same nonzeros one by one."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import hardware, middle
from lightning_sparse.bench.networks import precision_of
from lightning_sparse.kernels import dispatch
from lightning_sparse.rules.budgets import budget
from lightning_sparse.storage import BlockLinear, SparseLinear

__all__ = ["blocks"]

_BLOCK = 16, 16


def _layers(width: int, sparsity: float, device: torch.device) -> dict[str, nn.Module]:
    """Return one layer in all forms: dense, and by each backend of blocks of 16 x 16 and of single nonzeros."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(width, width)}
    number = budget(sparsity, width * width // 256)
    held = BlockLinear(width, width, number, _BLOCK)
    for kind in "blocks", "products":
        for name in dispatch.candidates(kind, device, torch.float32):
            layer = SparseLinear.from_dense(held.to_dense(), held.positions)
            if kind == "blocks":
                layer = BlockLinear.from_dense(held.to_dense(), held.positions, _BLOCK)
            layer.backend = name
            layers[f"{'blocks' if kind == 'blocks' else 'single nonzeros'}, {name}"] = layer
    return {name: layer.to(device) for name, layer in layers.items()}


def _pass(layer: nn.Module, x: Tensor, delta: Tensor, precision: str) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with precision_of(precision, x.device.type):
            y = layer(x)
        y.backward(delta.to(y.dtype))

    return step


def blocks(arguments: argparse.Namespace) -> None:
    """Print the time of a forward and backward pass of a layer with blocks of 16 x 16 over that of a dense one."""
    device, width = torch.device(arguments.device), arguments.width
    shape = f"{width} x {width}, batch {arguments.batch}, {arguments.precision}"
    print(f"{shape}, {hardware(arguments.device)}; forward and backward, over dense")
    x = torch.randn(arguments.batch, width, device=device, requires_grad=True)
    delta = torch.randn(arguments.batch, width, device=device)
    for sparsity in map(float, (arguments.sparsities or "0.9,0.98").split(",")):
        layers = _layers(width, sparsity, device)
        passes = {name: _pass(layer, x, delta, arguments.precision) for name, layer in layers.items()}
        times: dict[str, list[float]] = {name: [] for name in passes}
        for round_ in range(arguments.rounds + 1):
            for name, step in passes.items():
                taken = seconds(step, 1, arguments.device)
                if round_:  # the first one may compile
                    times[name].append(taken)
        print(f"{sparsity:g}  dense {1e3 * statistics.median(times['dense']):.1f} ms", flush=True)
        for name in list(times)[1:]:
            ratios = [ours / base for ours, base in zip(times[name], times["dense"], strict=True)]
            print(f"{sparsity:g}  {name:24s} {middle(ratios)}", flush=True)
