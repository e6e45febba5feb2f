"""The steps in which connections move."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_sparse.accounting.timing import seconds, synchronize
from lightning_sparse.bench.measure import hardware, middle, peak_above
from lightning_sparse.bench.networks import METHODS, NETWORKS, attach, bare_step, batch_for, on_meta
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules import ranking as rankings
from lightning_sparse.rules.budgets import portion
from lightning_sparse.storage.store import Storage
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.sparse import SparseWeight

__all__ = ["prepare", "ranking", "update"]


def _move(callback: PruneAndGrow, weights: Sequence[Weight]) -> None:
    callback.update(weights, 0.3, 1.0)


def _rank(callback: PruneAndGrow, weights: Sequence[Weight]) -> None:
    rankings.ranking(weights, portion(0.1, sum(weight.num_active for weight in weights)), [0] * len(weights))


def _masked(callback: PruneAndGrow, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network as it is."""
    return build()


def _sparse(callback: PruneAndGrow, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network with sparse layers, whose connections the method has drawn."""
    module = on_meta(build)
    choices = [choice for choice in select_parameters(module) if choice.reason is None]
    layers = [module.get_submodule(choice.name.rpartition(".")[0]) for choice in choices]
    callback.initial_masks([SparseWeight(c.name, c.shape, layer) for c, layer in zip(choices, layers, strict=True)])
    return module


#: what a method is given; those that need dense tensors have no such argument
_OPTIONS: dict[str, dict[str, Any]] = {"masked": {}, "sparse": {"storage": "sparse"}}

_MODULES: dict[str, Callable[[PruneAndGrow, Callable[[], nn.Module]], nn.Module]] = {
    "masked": _masked,
    "sparse": _sparse,
}


def _mover(
    arguments: argparse.Namespace,
    method: str,
    storage: Storage,
    sparsity: float,
    move: Callable[[PruneAndGrow, Sequence[Weight]], None] = _move,
) -> Callable[[], float]:
    """Return a function that takes a step in which connections move, and returns the seconds that ``move`` takes."""
    torch.manual_seed(0)
    build, device = NETWORKS[arguments.network][0], arguments.device
    callback = METHODS[method](sparsity=sparsity, **_OPTIONS[storage])
    if not isinstance(callback, PruneAndGrow):
        raise ValueError(f"--methods: an update of {method} cannot be measured by itself.")
    module = _MODULES[storage](callback, build)
    module.to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    attach(callback, module, optimizer)
    (group,) = callback._groups
    x, _ = batch_for(arguments.network, arguments.batch, device)

    def step() -> float:
        optimizer.zero_grad()
        listeners = callback.store.watch(group.weights, torch.Tensor.detach)
        module(x).square().mean().backward()
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            move(callback, group.weights)
        synchronize(device)
        spent = time.perf_counter() - start
        for listener in listeners:
            listener.close()
        callback.before_step(optimizer, 1.0, 1.0)
        optimizer.step()
        callback.after_update(optimizer)
        return spent

    return step


def prepare(arguments: argparse.Namespace) -> Callable[[], float]:
    """Return a step that moves connections of ``arguments.methods`` with ``arguments.storages``, one name each."""
    return _mover(arguments, arguments.methods, arguments.storages, float(arguments.sparsities))


def ranking(arguments: argparse.Namespace) -> None:
    """Print how long GGR takes to find which layers get a tenth of the connections: the first update's share."""
    print(f"{arguments.network}, {hardware(arguments.device)}")
    for sparsity in (arguments.sparsities or "0.9").split(","):
        step = _mover(arguments, "ggr", "masked", float(sparsity), _rank)
        print(f"{sparsity} ranking: {middle([1e3 * step() for _ in range(arguments.rounds)], 0)} ms", flush=True)


def update(arguments: argparse.Namespace) -> None:
    """Print how long an update of the connections takes, beside a dense step of the same run, and the peak memory."""
    print(f"{arguments.network}, batch {arguments.batch}, {hardware(arguments.device)}")
    module = NETWORKS[arguments.network][0]().to(arguments.device)
    dense = bare_step(module, batch_for(arguments.network, arguments.batch, arguments.device))
    print(f"dense step: {1e3 * statistics.median(seconds(dense, 1, arguments.device) for _ in range(3)):.0f} ms")
    del dense, module
    for sparsity in (arguments.sparsities or "0.9").split(","):
        for name in arguments.methods.split(","):
            for kind in arguments.storages.split(","):
                step = _mover(arguments, name, kind, float(sparsity))
                times = [1e3 * step() for _ in range(arguments.rounds)]
                del step
                memory = peak_above("updates", arguments, methods=name, storages=kind, sparsities=sparsity)
                print(
                    f"{sparsity} {name:18s} {kind:6s} update: {middle(times, 0)} ms; "
                    f"peak {memory:.0f} MB above the process's own",
                    flush=True,
                )
