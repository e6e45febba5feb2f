"""Truly sparse layers beside masks and dense training: time, peak memory, bytes of the tensors of training."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_sparse import SET
from lightning_sparse.accounting.memory import stored_bytes
from lightning_sparse.accounting.timing import seconds, synchronize
from lightning_sparse.bench.measure import child, hardware, megabytes, middle, peak_above, peak_megabytes
from lightning_sparse.bench.networks import NETWORKS, NEVER, bare_step, batch_for, on_meta, precision_of
from lightning_sparse.bench.trainers import Plain, fit_seconds
from lightning_sparse.compat.lightning import Callback, LightningModule, Trainer
from lightning_sparse.kernels.products import candidates
from lightning_sparse.layers.sparse import sparse_layers
from lightning_sparse.rules import sampling
from lightning_sparse.rules.budgets import budget
from lightning_sparse.storage import make_sparse_
from lightning_sparse.storage.measure import Inputs, choose, measure_all, ways
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["fit", "fitted", "prepare", "program", "storage"]


def _step(arguments: argparse.Namespace, kind: str, sparsity: float) -> Callable[[], None]:
    """Return a step with weights of this kind: ``"dense"``, ``"masked"``, or the backend of sparse layers.

    ``"sparse"``: each layer has the backend that a fit would choose.
    """
    torch.manual_seed(0)
    build, device = NETWORKS[arguments.network][0], arguments.device
    method = SET(sparsity, distribution="uniform", update_every=NEVER) if kind == "masked" else None
    if kind in ("dense", "masked"):
        module = build()
    else:
        module = on_meta(build)
        for layer in list(module.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                size = layer.weight.numel()
                positions = sampling.distinct(budget(sparsity, size), size, torch.default_generator)
                make_sparse_(layer, positions).backend = None if kind == "sparse" else kind
    batch = batch_for(arguments.network, arguments.batch, device)
    step = bare_step(module.to(device), batch, method, precision=arguments.precision)
    if kind == "sparse":
        layers, inputs = sparse_layers(module), Inputs(sparse_layers(module))
        step()
        inputs.close()
        choose(layers, measure_all(layers, inputs.found, ways, partial(precision_of, arguments.precision, device)))
    return step


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Return a step with weights of the kind ``arguments.storages``, one name of those of ``_step``."""
    return _step(arguments, arguments.storages, float(arguments.sparsities))


def storage(arguments: argparse.Namespace) -> None:
    """Print step time and peak memory with masks and with sparse layers, by each backend, over those of dense ones."""
    device = arguments.device
    kinds = ["masked", "sparse", *candidates(torch.device(device), torch.float32)]
    print(f"{arguments.network}, batch {arguments.batch}, {arguments.precision}, {hardware(device)}")
    memory = peak_above("storage", arguments, storages="dense", sparsities=0.0)
    print(f"dense: peak {memory:.0f} MB above the process's own memory; the following is over dense training's")
    dense = _step(arguments, "dense", 0.0)
    dense()
    often, base = max(1, int(arguments.seconds / seconds(dense, 3, device) / 2)), []
    for sparsity in (arguments.sparsities or "0.9,0.95,0.98,0.99,0.995").split(","):
        steps = {kind: _step(arguments, kind, float(sparsity)) for kind in kinds}
        for step in steps.values():
            step()
        ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for kind, step in steps.items():
                count = max(1, int(arguments.seconds / seconds(step, 1, device)))
                before, ours = seconds(dense, often, device), seconds(step, count, device)
                base.append((before + seconds(dense, often, device)) / 2)
                ratios[kind].append(ours / base[-1])
        steps.clear()
        for kind in kinds:
            peak = peak_above("storage", arguments, storages=kind, sparsities=sparsity) / memory
            print(f"{sparsity:5s}  {kind:6s}  step time {middle(ratios[kind])}  peak memory {peak:.3f}", flush=True)
        beside = [ours / masked for ours, masked in zip(ratios["sparse"], ratios["masked"], strict=True)]
        print(f"{sparsity:5s}  sparse  step time over masked {middle(beside)}", flush=True)
    print(f"dense step: {1e3 * statistics.median(base):.2f} ms")


class _Built(Plain):
    """A network that is made in ``configure_model``, without values where ``meta``."""

    def __init__(self, network: str, meta: bool) -> None:
        super().__init__(nn.Identity())
        self.name, self.meta = network, meta

    def configure_model(self) -> None:
        """Make the network."""
        build = NETWORKS[self.name][0]
        self.network = on_meta(build) if self.meta else build()


class _Clock(Callback):
    """Notes the time of each step, and when training ends its peak of memory and the bytes of its tensors."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Begin a step."""
        synchronize(self.device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """End a step."""
        synchronize(self.device)
        self.times.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read memory before sparse layers are made dense."""
        self.peak = peak_megabytes(self.device)
        held = [callback.state_tensors for callback in trainer.callbacks if isinstance(callback, SparseCallback)]  # type: ignore[attr-defined]
        self.stored = sum(stored_bytes(pl_module, trainer.optimizers, held).values()) / 1e6


def fitted(arguments: argparse.Namespace) -> None:
    """Print of one fit: median and longest step in s; in MB its peak, its tensors, the peak with the fit's end."""
    device, sparse = arguments.device, arguments.storages == "sparse"

    def run(network: str, batch: int, steps: int) -> _Clock:
        options: dict[str, Any] = {"distribution": "uniform", "update_every": steps // 2, "storage": "sparse"}
        methods: list[Callback] = [SET(float(arguments.sparsities), **options)] if sparse else []
        clock = _Clock(device)
        fit_seconds(_Built(network, sparse), batch_for(network, batch), steps, [*methods, clock], device=device)
        return clock

    run("lenet300", arguments.batch, 4)  # loads and compiles what is needed
    before = megabytes(device)
    clock = run(arguments.network, arguments.batch, arguments.steps)
    end = peak_megabytes(device) - before
    print(statistics.median(clock.times[1:]), max(clock.times[1:]), clock.peak - before, clock.stored, end)


def fit(arguments: argparse.Namespace) -> None:
    """Print time and memory of a fit in a Trainer with ``storage="sparse"`` over those of a dense one.

    Each is a process of its own, dense and sparse in turn. The sparse module is made on the meta device in
    ``configure_model``, and SET moves connections in the middle of the fit.
    """
    print(f"{arguments.network}, batch {arguments.batch}, in a Trainer, {hardware(arguments.device)}")

    def run(kind: str, sparsity: str) -> list[float]:
        return child("fitted", arguments, storages=kind, sparsities=sparsity, steps=arguments.steps or 10)

    for sparsity in (arguments.sparsities or "0.9,0.98").split(","):
        rounds = [[run(kind, sparsity) for kind in ("dense", "sparse", "dense")] for _ in range(arguments.rounds)]
        dense = [[(a + b) / 2 for a, b in zip(before, after, strict=True)] for before, _, after in rounds]
        step, _, peak, tensors, _ = (statistics.median(row) for row in zip(*dense, strict=True))
        print(f"{sparsity:5s}  dense: step {1e3 * step:.0f} ms, peak {peak:.0f} MB, tensors {tensors:.0f} MB")
        names = ("step", "longest step (of which one moves connections)", "peak", "tensors", "peak with the fit's end")
        for column, name in enumerate(names):
            below = 0 if column == 1 else column  # every dense step is as long as another
            ratios = [ours[column] / base[below] for (_, ours, _), base in zip(rounds, dense, strict=True)]
            print(f"{sparsity:5s}  sparse / dense: {name} {middle(ratios)}", flush=True)


def program(arguments: argparse.Namespace) -> None:
    """Print the peak memory of a whole program with sparse layers over that of a dense one, see ``program.py``."""
    steps = arguments.steps or 6

    def run(kind: str, sparsity: str) -> float:
        sizes = [sparsity, arguments.width, arguments.batch, steps, arguments.threads]
        command = [sys.executable, str(Path(__file__).with_name("program.py")), kind, *map(str, sizes)]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

    print(f"three layers of {arguments.width}, batch {arguments.batch}, 2 epochs of {steps} steps, {hardware('cpu')}")
    dense = statistics.median(run("dense", "0") for _ in range(arguments.rounds))
    print(f"dense: peak {dense:.0f} MB above torch and Lightning", flush=True)
    for sparsity in (arguments.sparsities or "0.9,0.98").split(","):
        for kind in arguments.storages.split(","):
            peaks = [run(kind, sparsity) for _ in range(arguments.rounds)]
            print(f"{sparsity:5s}  {kind:6s}  peak / dense: {middle([peak / dense for peak in peaks])}", flush=True)
