"""The steps in which connections move, as many as the method's first update moves."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.bench.measure import hardware, middle, peak_above
from lightning_sparse.bench.networks import METHODS, NETWORKS, attach, bare_step, batch_for, on_meta
from lightning_sparse.families.moving import move
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules import ranking as rankings
from lightning_sparse.rules.budgets import portion
from lightning_sparse.storage.store import Storage
from lightning_sparse.weights.group import WeightGroup
from lightning_sparse.weights.sparse import SparseWeight

__all__ = ["prepare", "ranking", "update"]


def _move(callback: PruneAndGrow, group: WeightGroup) -> None:
    move(callback, group.weights, group, 1.0)


def _rank(callback: PruneAndGrow, group: WeightGroup) -> None:
    rankings.ranking(group.weights, portion(0.1, group.num_active), [0] * len(group.weights))


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
    move: Callable[[PruneAndGrow, WeightGroup], None] = _move,
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
    module.automatic_optimization = True  # type: ignore[assignment]  # as a LightningModule has it
    callback._fit.module = cast(Any, module)
    x, _ = batch_for(arguments.network, arguments.batch, device)

    @torch.no_grad()
    def update() -> None:
        move(callback, group)

    def step() -> float:
        optimizer.zero_grad()
        group.due = True
        callback._watch.begin()  # what listens from now on is there for the update
        group.due = False
        module(x).square().mean().backward()
        spent = seconds(update, 1, device)
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
    dense()  # makes the optimizer's state
    of_dense = 1e3 * statistics.median(seconds(dense, 1, arguments.device) for _ in range(arguments.rounds))
    print(f"dense step: {of_dense:.0f} ms")
    del dense, module
    for sparsity in (arguments.sparsities or "0.9").split(","):
        for name in arguments.methods.split(","):
            for kind in arguments.storages.split(","):
                step = _mover(arguments, name, kind, float(sparsity))
                step()  # loads and compiles what is needed
                times = [1e3 * step() for _ in range(arguments.rounds)]
                del step
                memory = peak_above("updates", arguments, methods=name, storages=kind, sparsities=sparsity)
                print(
                    f"{sparsity} {name:18s} {kind:6s} update: {middle(times, 0)} ms, "
                    f"{statistics.median(times) / of_dense:.2f} of the dense step; "
                    f"peak {memory:.0f} MB above the process's own",
                    flush=True,
                )
