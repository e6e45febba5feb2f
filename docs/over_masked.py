"""Steps with sparse storage, with masks and dense ones, in turn: ``python docs/over_masked.py vgg16 0.9``."""

import argparse
import logging
import warnings

import torch

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import middle
from lightning_sparse.bench.networks import NETWORKS
from lightning_sparse.bench.storage import prepare

KINDS = "dense", "masked", "sparse"


def turn(steps, times):
    """Return the mean time of a step of each kind, forwards and then backwards through the kinds."""
    found = dict.fromkeys(KINDS, 0.0)
    for kind in (*KINDS, *reversed(KINDS)):
        found[kind] += seconds(steps[kind], times[kind], "cpu") / 2
    return found


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("sparsities", nargs="+")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    common = {"network": arguments.network, "batch": arguments.batch, "device": "cpu", "precision": "32-true"}
    for sparsity in arguments.sparsities:
        steps = {}
        for kind in KINDS:
            options = argparse.Namespace(**common, storages=kind, sparsities=sparsity)
            steps[kind] = prepare(options)
        for step in steps.values():
            step()
        times = {kind: max(1, int(0.5 / seconds(step, 1, "cpu"))) for kind, step in steps.items()}
        rounds = [turn(steps, times) for _ in range(arguments.rounds)]
        for name, below in (("masked", "dense"), ("sparse", "dense"), ("sparse", "masked")):
            ratios = [found[name] / found[below] for found in rounds]
            print(f"{sparsity}: {name} over {below} {middle(ratios)}", flush=True)


if __name__ == "__main__":
    main()
