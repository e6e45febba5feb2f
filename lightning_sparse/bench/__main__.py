"""``python -m lightning_sparse.bench``."""

import argparse
import logging
import warnings
from collections.abc import Callable

import torch

from lightning_sparse import bench
from lightning_sparse.bench import (
    blocks,
    convolutions,
    gpu,
    launches,
    measure,
    semi_structured,
    shards,
    steps,
    storage,
    traffic,
    trainers,
    updates,
)
from lightning_sparse.bench.networks import METHODS, NETWORKS, PRECISIONS
from lightning_sparse.compat.lightning import PACKAGE

__all__ = ["main"]

Benchmark = Callable[[argparse.Namespace], None]

BENCHMARKS: dict[str, Benchmark] = {
    "overhead": steps.overhead,
    "memory": steps.memory,
    "compile": steps.compiled,
    "launches": launches.launches,
    "gpu": gpu.gpu,
    "trainer": trainers.trainer,
    "hooks": trainers.hooks,
    "monitor": trainers.monitor,
    "update": updates.update,
    "ranking": updates.ranking,
    "storage": storage.storage,
    "fit": storage.fit,
    "program": storage.program,
    "convolutions": convolutions.convolutions,
    "blocks": blocks.blocks,
    "semi-structured": semi_structured.semi_structured,
    "traffic": traffic.traffic,
    "shards": shards.shards,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_sparse.bench", description=bench.__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "peak", "fitted"])
    parser.add_argument("--network", choices=[*NETWORKS, "decoder"], default="lenet300", help="decoder: for shards")
    parser.add_argument("--methods", default="dst,dfbst,autosparse,str", help="separated by commas")
    parser.add_argument("--sparsities", help="where they are varied, separated by commas")
    parser.add_argument("--storages", default="masked", help="for update and program, separated by commas")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=4096, help="of the layers for program, blocks and shards")
    parser.add_argument(
        "--steps", type=int, help="of an epoch; default: 938 (MNIST's) for monitor, 10 for fit, 6 for program"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", default="1,2,4", help="for shards, numbers separated by commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long one turn takes, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="for overhead, memory and storage")
    parser.add_argument("--of", choices=("steps", "updates", "storage"), default="steps", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    known = {*(launches.ALL if parsed.benchmark == "launches" else METHODS), "none"}
    if unknown := sorted({*parsed.methods.split(",")} - known):
        parser.error(f"--methods: no method is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    torch.set_num_threads(parsed.threads)
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # parts of a benchmark, in processes of their own that it starts
    hidden: dict[str, Benchmark] = {"fitted": storage.fitted, "peak": measure.peak}
    {**BENCHMARKS, **hidden}[parsed.benchmark](parsed)


if __name__ == "__main__":
    main()
