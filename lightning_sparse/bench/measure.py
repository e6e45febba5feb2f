"""How benchmarks measure: times in turn in one process, peaks of memory in processes of their own."""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from lightning_sparse import kernels
from lightning_sparse.process import peak_memory, resident_memory

__all__ = [
    "child",
    "hardware",
    "megabytes",
    "middle",
    "peak",
    "peak_above",
    "peak_megabytes",
    "preparation",
    "seconds",
    "synchronize",
]


def hardware(device: str) -> str:
    """Return in words what computes."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = kernels.for_tensors(torch.zeros(1, 1), torch.zeros(1, 1)).__name__.rsplit(".", 1)[1]
    return f"{torch.get_num_threads()} CPU thread(s), {name}, torch {torch.__version__}"


def synchronize(device: str) -> None:
    """Wait for what the device still computes."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def megabytes(device: str) -> float:
    """Return what this process has on the CPU or its tensors take on a GPU, in MB."""
    return (resident_memory() if device == "cpu" else torch.cuda.memory_allocated(device)) / 1e6


def peak_megabytes(device: str) -> float:
    """Return the largest ``megabytes`` so far."""
    return (peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated(device)) / 1e6


def seconds(step: Callable[[], object], count: int, device: str) -> float:
    """Return the mean time of ``count`` steps."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count


def middle(values: Sequence[float], digits: int = 3) -> str:
    """Return median and range in words."""
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def child(benchmark: str, arguments: argparse.Namespace, **options: object) -> list[float]:
    """Run a benchmark in a process of its own and return the numbers that it prints."""
    shared = {"network": arguments.network, "batch": arguments.batch, "device": arguments.device}
    shared |= {"threads": arguments.threads, "precision": arguments.precision, **options}
    command = [sys.executable, "-m", "lightning_sparse.bench", benchmark]
    command += [part for name, value in shared.items() for part in (f"--{name}", str(value))]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(word) for word in printed.split()]


def peak(arguments: argparse.Namespace) -> None:
    """Print this process's memory in MB before a network is made, and its peak after five steps of its training."""
    prepare = preparation(arguments.of)
    _small_step(prepare, arguments)
    before = megabytes(arguments.device)
    step = prepare(arguments)
    for _ in range(5):
        step()
    print(before, peak_megabytes(arguments.device))


def peak_above(of: str, arguments: argparse.Namespace, **options: object) -> float:
    """Return the peak of a process that trains, in MB above what it takes before; see ``peak``.

    ``of`` is the module of this package whose ``prepare`` makes the step. A GPU counts the bytes of tensors, which this
    process tells as well as another.
    """
    if arguments.device == "cpu":
        before, after = child("peak", arguments, of=of, **options)
        return after - before
    prepare, arguments = preparation(of), argparse.Namespace(**{**vars(arguments), **options})
    _small_step(prepare, arguments)
    gc.collect()
    before = megabytes(arguments.device)
    torch.cuda.reset_peak_memory_stats(arguments.device)
    step = prepare(arguments)
    for _ in range(5):
        step()
    return peak_megabytes(arguments.device) - before


def _small_step(prepare: Callable[[argparse.Namespace], Callable[[], object]], arguments: argparse.Namespace) -> None:
    """Take a step of a small network: it loads and compiles what is needed."""
    prepare(argparse.Namespace(**{**vars(arguments), "network": "lenet300", "batch": 1}))()


def preparation(of: str) -> Callable[[argparse.Namespace], Callable[[], object]]:
    """Return the function ``prepare`` of the module of this name in this package."""
    prepare: Callable[[argparse.Namespace], Callable[[], object]]
    prepare = import_module(f"{__package__}.{of}").prepare
    return prepare
