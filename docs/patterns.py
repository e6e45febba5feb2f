"""Patterns beside unstructured sparsity, at equal density, on part of MNIST and CIFAR-10: tables of guides/patterns.md.

``python docs/patterns.py DIR --out results.csv`` trains what the file does not hold yet and adds a line to it after
each run, so it may be broken off and started again. Then it prints the mean accuracy over the seeds that the file
holds. DIR holds MNIST/raw, and cifar10/train and cifar10/test with JPEG files in folders of classes. Networks,
densities, patterns, methods, seeds, images and epochs may be chosen; one CPU thread. ``--times`` trains nothing: it
prints how long a layer of 4096 x 4096 takes in the form that pays. ``--forms`` does so for the networks: it measures
all forms but the dense one that a pattern has, and prints the quickest.
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from grid import Results, SmallCNN, cifar10, mnist, trained
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_sparse import GMP, SET, SRSTE, SSTE, RandomPruning, RigL, SRigL, attach
from lightning_sparse.export import compact, to_csr
from lightning_sparse.rules import sampling
from lightning_sparse.rules.fan_in import FanIn
from lightning_sparse.storage import SparseLinear, make_blocks_, make_sparse_
from lightning_sparse.zoo.models import LeNet300

#: network, data, layers that stay dense (those whose rows are classes, or that have one input or three), images, epochs
NETWORKS = {
    "lenet300": (LeNet300, mnist, ["fc3.weight"], 4_000, 3),
    "cnn": (SmallCNN, mnist, ["first.*", "head.*"], 4_000, 2),
    "cifar": (partial(SmallCNN, channels=3, size=32), cifar10, ["first.*", "head.*"], 10_000, 3),
}
#: of an image
SHAPES = {mnist: (1, 28, 28), cifar10: (3, 32, 32)}
DENSITIES = (0.5, 0.25, 0.1)
N_OF_M = {0.5: "2:4", 0.25: "1:4"}
BATCH = 64
PATTERNS = ("unstructured", "N:M", "block:4x4", "row", "fan-in")
METHODS: dict[str, Callable[..., pl.Callback]] = {
    "RigL": RigL,
    "SET": SET,
    "GMP": partial(GMP, begin_at=0.2, end_at=0.75, update_every=10, scope="layer"),
}
#: methods that train one pattern alone
OWN: dict[str, dict[str, Callable[..., pl.Callback]]] = {
    "N:M": {"SRSTE": SRSTE, "SSTE": SSTE},
    "fan-in": {"SRigL": SRigL},
}
ALL = [*METHODS, *(method for methods in OWN.values() for method in methods)]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
RESULTS = ("accuracy", "active", "seconds", "revision")


class Run(NamedTuple):
    """What is trained."""

    network: str
    images: int
    epochs: int
    seed: int
    density: float
    pattern: str
    method: str

    @property
    def kind(self) -> str:
        """One of ``PATTERNS``."""
        return self.pattern if self.pattern in PATTERNS else "N:M"

    @property
    def callback(self) -> pl.Callback:
        """The method."""
        if self.method == "dense":
            return pl.Callback()
        exclude, budget = NETWORKS[self.network][2], {"sparsity": 1 - self.density, "distribution": "uniform"}
        own = OWN.get(self.kind, {}).get(self.method)
        if own is None:
            return METHODS[self.method](**budget, exclude=exclude, pattern=self.pattern)
        return own(pattern=self.pattern, exclude=exclude) if self.kind == "N:M" else own(**budget, exclude=exclude)


def runs(chosen) -> Iterator[Run]:
    """Yield what is to be trained, the first seed of everything first."""
    networks, patterns, methods = (part.split(",") for part in (chosen.networks, chosen.patterns, chosen.methods))
    densities = [float(x) for x in chosen.densities.split(",")]
    for network, seed, kind, density in product(networks, range(chosen.seeds), patterns, densities):
        *_, images, epochs = NETWORKS[network]
        if kind == "unstructured" and density == densities[0]:
            yield Run(network, chosen.images or images, chosen.epochs or epochs, seed, 1.0, kind, "dense")
        pattern = N_OF_M.get(density) if kind == "N:M" else kind
        trained = {**(METHODS if kind != "fan-in" else {}), **OWN.get(kind, {})}
        for method in (method for method in methods if pattern and method in trained):
            yield Run(network, chosen.images or images, chosen.epochs or epochs, seed, density, pattern, method)


def train(chosen):
    """Train all that the file lacks."""
    results, load = Results(chosen.out, Run, RESULTS), cache(lambda data: data(chosen.data_dir))
    for run in (run for run in runs(chosen) if run not in results.rows):
        build, data, *_ = NETWORKS[run.network]
        images, start = load(data), time.process_time()
        found = trained(images, run, build, SGD)
        results.add(run, *found, round(time.process_time() - start, 1))


def table(chosen):
    """Print means and deviations of accuracies, in percent."""
    found = defaultdict(list)
    for run, row in Results(chosen.out, Run, RESULTS).rows.items():
        found[run.network, run.density, run.method, run.kind].append(float(row["accuracy"]))
    print(f"| network | density | method | {' | '.join(PATTERNS)} |\n|{'---|' * (3 + len(PATTERNS))}")
    for network, density, method in product(NETWORKS, (1.0, *DENSITIES), ["dense", *ALL]):
        cells = [shown(found.get((network, density, method, pattern), [])) for pattern in PATTERNS]
        if any(cells):
            print(f"| {network} | {density:g} | {method} | {' | '.join(cells)} |")


def shown(found):
    """Return mean and deviation as the table has them."""
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""


def layers(density: float, generator: torch.Generator) -> dict[str, nn.Module]:
    """Return a layer of 4096 x 4096 in the forms that pay."""
    size = 4096
    dense = nn.Linear(size, size)
    kept = FanIn().draw(round(density * size) * size, (size, size), generator)
    positions = {"unstructured": sampling.distinct(len(kept), size * size, generator), "fan-in": kept}
    blocks = torch.rand(size // 4, size // 4, generator=generator) < density
    mask = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    positions["block:4x4"] = mask.view(-1).nonzero().view(-1)
    sparse = {name: SparseLinear.from_dense(dense, found) for name, found in positions.items()}
    return {"dense": dense, **sparse, "row": nn.Linear(size, round(density * size))}


def times(chosen):
    """Print times of a training step and of inference of a layer, over those of the dense one, in the same rounds."""
    names = [name for name in PATTERNS if name != "N:M"]
    print(f"| density | batch | {' | '.join(f'{name}: step, inference' for name in names)} |")
    for density in (float(x) for x in chosen.densities.split(",")):
        forms = layers(density, torch.Generator().manual_seed(0))
        products = {name: to_csr(layer) if isinstance(layer, SparseLinear) else layer for name, layer in forms.items()}
        for batch in (1, 16, 64, 256):
            x = torch.rand(batch, 4096)
            work = {(name, "step"): partial(step, layer, x) for name, layer in forms.items()}
            work |= {(name, "inference"): partial(infer, layer, x) for name, layer in products.items()}
            best = least(work, chosen.rounds)
            both = ([best[name, kind] / best["dense", kind] for kind in ("step", "inference")] for name in names)
            ratios = " | ".join(f"{step:.2f}, {inference:.2f}" for step, inference in both)
            print(f"| {density:g} | {batch} | {ratios} |", flush=True)


def form_times(chosen):
    """Print the times of the networks' quickest forms over dense: a training step, and inference."""
    print(f"| network | density | {' | '.join(PATTERNS)} |\n|{'---|' * (2 + len(PATTERNS))}")
    y = torch.arange(BATCH) % 10
    for network, density in product(chosen.networks.split(","), map(float, chosen.densities.split(","))):
        x = torch.rand(BATCH, *SHAPES[NETWORKS[network][1]])
        work: dict = {}
        for pattern in chosen.patterns.split(","):
            for kind, found in forms(network, density, pattern, x).items():
                call = partial(update, x=x, y=y) if kind == "step" else partial(infer, x=x)
                work |= {(pattern, kind, name): repeated(partial(call, module)) for name, module in found.items()}
        best = least(work, chosen.rounds)
        cells = [[quickest(best, pattern, kind) for kind in ("step", "inference")] for pattern in PATTERNS]
        print(
            f"| {network} | {density:g} | {' | '.join(', '.join(filter(None, cell)) for cell in cells)} |", flush=True
        )


def forms(network, density, pattern, x):
    """Return the forms in which a network of this pattern can be trained and used, by name."""
    build, _, exclude, *_ = NETWORKS[network]
    name = N_OF_M.get(density) if pattern == "N:M" else pattern
    if name is None:
        return {}
    budget = {"sparsity": 1 - density, "distribution": "uniform", "exclude": exclude}
    method = SRigL(**budget) if pattern == "fan-in" else RandomPruning(**budget, pattern=name)
    module = build(optimizer=SGD)
    with attach(method, module, SGD(module.parameters()), steps=1):
        pass  # the zeros are there
    sparse = stored(module, method.masks)
    found = {"step": {"dense": module, "sparse": sparse}}
    found["inference"] = {"dense": module, "CSR": to_csr(sparse, min_sparsity=1.0)}
    if pattern == "row":
        found["inference"]["compact"] = compact(module.eval(), x)[0]
    if pattern == "block:4x4" and network == "lenet300":
        blocks = stored(module, method.masks, (4, 4))
        found = {kind: {**each, "block": blocks} for kind, each in found.items()}
    return found


def stored(module, masks, block=None):
    """Return a copy that stores the nonzeros alone, one by one or as blocks."""
    module = copy.deepcopy(module)
    for name, mask in masks.items():
        layer = make_sparse_(module.get_submodule(name.removesuffix(".weight")), mask.view(-1).nonzero().view(-1))
        if block:
            make_blocks_(layer, block)
    return module


def quickest(best, pattern, kind):
    """Return the least time over dense of the other forms, and which takes it."""
    times = {name: time for (of, which, name), time in best.items() if (of, which) == (pattern, kind)}
    if not times:
        return ""
    dense = times.pop("dense")
    name = min(times, key=times.get)
    return f"{times[name] / dense:.2f} {name}"


def repeated(call):
    """Return what calls it some times."""
    return lambda: [call() for _ in range(10)]


def update(module, x, y):
    """Make a step of SGD with momentum."""
    if not hasattr(module, "sgd"):
        module.sgd = SGD(module.parameters())
    module.sgd.zero_grad()
    cross_entropy(module(x), y).backward()
    module.sgd.step()


def least(work, rounds):
    """Return the least processor time of each of several functions, which are called in turn."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, call in work.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start) if turn else best[name]
    return best


def step(layer, x):
    """Compute output and gradients."""
    x = x.requires_grad_()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


@torch.no_grad()
def infer(layer, x):
    """Compute the output."""
    layer(x)


def main():
    """Train and print the table, or measure times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", nargs="?")
    parser.add_argument("--out", default="patterns.csv")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--methods", default=",".join(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="number of training images; default: the network's")
    parser.add_argument("--epochs", type=int, help="default: the network's")
    parser.add_argument("--times", action="store_true", help="measure a layer of 4096 x 4096, train nothing")
    parser.add_argument("--forms", action="store_true", help="measure the networks, train nothing")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement; the least time counts")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if chosen.times or chosen.forms:
        (times if chosen.times else form_times)(chosen)
        return
    if chosen.data_dir:
        train(chosen)
    table(chosen)


if __name__ == "__main__":
    main()
