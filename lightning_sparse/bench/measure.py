"""How benchmarks measure: times in turn in one process, peaks of memory in processes of their own."""

import argparse
import gc
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from lightning_sparse.accounting.memory import peak_memory, resident_memory
from lightning_sparse.kernels import dispatch

__all__ = [
    "child",
    "hardware",
    "megabytes",
    "middle",
    "peak",
    "peak_above",
    "peak_megabytes",
]


def hardware(device: str) -> str:
    """Return in words what computes."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = next(iter(dispatch.candidates("thresholds", torch.device("cpu"), torch.float32)))
    return f"{torch.get_num_threads()} CPU thread(s), {name}_kernels, torch {torch.__version__}"


def megabytes(device: str) -> float:
    """Return what this process has on the CPU or its tensors take on a GPU, in MB."""
    return (resident_memory() if device == "cpu" else torch.cuda.memory_allocated(device)) / 1e6


def peak_megabytes(device: str) -> float:
    """Return the largest ``megabytes`` so far."""
    return (peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated(device)) / 1e6


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
    print(*_before_and_peak(arguments))


def peak_above(of: str, arguments: argparse.Namespace, **options: object) -> float:
    """Return the peak of a process that trains, in MB above what it takes before; see ``peak``.

    ``of`` is the module of this package whose ``prepare`` makes the step. A GPU counts the bytes of tensors, which this
    process tells as well as another.
    """
    if arguments.device == "cpu":
        before, after = child("peak", arguments, of=of, **options)
    else:
        before, after = _before_and_peak(argparse.Namespace(**{**vars(arguments), "of": of, **options}))
    return after - before


def _before_and_peak(arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the memory in MB before the network of ``arguments`` is made, and the peak after five of its steps."""
    prepare = import_module(f"{__package__}.{arguments.of}").prepare
    for small in "lenet300", "small":  # loads and compiles what linear layers and convolutions need
        prepare(argparse.Namespace(**{**vars(arguments), "network": small}))()
    gc.collect()
    before = megabytes(arguments.device)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats(arguments.device)
    step = prepare(arguments)
    for _ in range(5):
        step()
    return before, peak_megabytes(arguments.device)
