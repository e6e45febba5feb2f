"""A step of training with a method beside a dense one: time, memory, compiled."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import child, hardware, middle
from lightning_sparse.bench.networks import METHODS, NETWORKS, bare_step, batch_for

__all__ = ["compiled", "memory", "overhead", "prepare"]


def _trained(
    arguments: argparse.Namespace, method: str, inductor: bool = False
) -> tuple[Callable[[], None], nn.Module]:
    """Return a function that takes a step with the method of this name, or with ``"none"``, and the module."""
    torch.manual_seed(0)
    module = NETWORKS[arguments.network][0]().to(arguments.device)
    batch = batch_for(arguments.network, arguments.batch, arguments.device)
    model: Any = torch.compile(module) if inductor else None
    callback = None if method == "none" else METHODS[method]()
    return bare_step(module, batch, callback, model, arguments.precision), module


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Return a step with ``arguments.methods``, one name or ``"none"``."""
    return _trained(arguments, arguments.methods)[0]


def overhead(arguments: argparse.Namespace) -> None:
    """Print, for each method, its step time over the dense one: median and range over rounds of A and B in turn."""
    device = arguments.device
    names = arguments.methods.split(",")
    print(f"{arguments.network}, batch {arguments.batch}, {arguments.precision}, {hardware(device)}")
    steps = {name: _trained(arguments, name)[0] for name in names}
    dense = _trained(arguments, "none")[0]
    count = max(1, int(arguments.seconds / seconds(dense, 3, device)))
    for step in steps.values():
        seconds(step, max(3, count // 10), device)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    base = []
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            before, sparse = seconds(dense, count, device), seconds(step, count, device)
            base.append((before + seconds(dense, count, device)) / 2)
            ratios[name].append(sparse / base[-1])
    print(f"dense step: {statistics.median(base) * 1e3:.3f} ms (median of {len(base)} rounds of {count} steps)")
    for name, values in ratios.items():
        print(f"{name:18s} step time / dense: {middle(values)}", flush=True)


def memory(arguments: argparse.Namespace) -> None:
    """Print each method's peak memory over the dense one's; each is measured in a process of its own."""
    print(f"{arguments.network}, batch {arguments.batch}, {arguments.precision}, {hardware(arguments.device)}")
    idle, dense = child("peak", arguments, of="steps", methods="none")
    print(f"dense peak: {dense:.0f} MB, of which {idle:.0f} MB are the process before the network is made")
    for name in arguments.methods.split(","):
        base, sparse = child("peak", arguments, of="steps", methods=name)
        ratio = (sparse - base) / (dense - idle)
        print(
            f"{name:18s} peak / dense: {sparse / dense:.3f}; without the process's own {base:.0f} MB: {ratio:.3f}",
            flush=True,
        )


def compiled(arguments: argparse.Namespace) -> None:
    """Train with torch.compile (inductor) and without: print how far weights are apart, and the ratio of step times."""
    device = arguments.device
    print(f"{arguments.network}, batch {arguments.batch}, torch.compile, {hardware(device)}")
    for name in arguments.methods.split(","):
        (quick, fast), (eager, slow) = (_trained(arguments, name, inductor=inductor) for inductor in (True, False))
        for step in (quick, eager):
            seconds(step, 20, device)
        pairs = zip(fast.parameters(), slow.parameters(), strict=True)
        apart = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)
        ratios = [seconds(quick, 20, device) / seconds(eager, 20, device) for _ in range(5)]
        print(
            f"{name:18s} apart after 20 steps: {apart:.1e} relative; compiled / eager step: {middle(ratios)}",
            flush=True,
        )
