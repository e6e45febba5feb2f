"""A training step of a linear layer with operators for 2:4 weights beside a dense one, on a GPU: widths and rows."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import hardware, middle
from lightning_sparse.kernels.semi_structured import capability as capability_of
from lightning_sparse.kernels.semi_structured import why_dense
from lightning_sparse.layers.semi_structured import linear_2_4
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.transposable import largest_tiles

__all__ = ["semi_structured"]

_WIDTHS = 4096, 8192
_ROWS = 2048, 4096, 8192, 16384
_CALLS = 10


def semi_structured(arguments: argparse.Namespace) -> None:
    """Print times of forward and backward passes in bfloat16 over those of a dense layer; on a CPU, of a small one."""
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    print(f"bfloat16, {hardware(arguments.device)}; forward and backward, over dense", flush=True)
    for width, rows in product((64,) if on_cpu else _WIDTHS, (8,) if on_cpu else _ROWS):
        reason = why_dense((width, width), torch.bfloat16, capability_of(device), both=True)
        print(f"{width} x {width}, {rows} rows: {_line(width, rows, reason, arguments)}", flush=True)


def _line(width: int, rows: int, reason: str | None, arguments: argparse.Namespace) -> str:
    """Return the time of the dense layer, and what the products that are 2:4 make of it, or why there are none."""
    steps = _steps(width, rows, arguments.device, dense_only=reason is not None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            taken = seconds(step, 1 if arguments.device == "cpu" else _CALLS, arguments.device)
            if round_:  # the first one chooses algorithms
                times[name].append(taken)
    dense = times.pop("dense")
    words = [f"dense {1e3 * statistics.median(dense):.3f} ms"]
    for name, ours in times.items():
        words.append(f"{name} {middle([time / base for time, base in zip(ours, dense, strict=True)])}")
    return "  ".join(words if reason is None else [*words, reason])


def _steps(width: int, rows: int, device: str, dense_only: bool) -> dict[str, Callable[[], object]]:
    """Return what computes an output and all gradients, by name."""
    torch.manual_seed(0)
    W = torch.randn(width, width, device=device)
    W = (W * largest_tiles(W.abs(), FIRST, 2)).bfloat16().requires_grad_()
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(rows, width, device=device, dtype=torch.bfloat16)

    def step(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(multiply(x, W), (x, W), dy)

    steps = {"dense": step(functional.linear)}
    if not dense_only:
        steps["output 2:4"] = step(partial(linear_2_4, bias=None, both=False))
        steps["output and input gradient 2:4"] = step(partial(linear_2_4, bias=None, both=True))
    return steps
