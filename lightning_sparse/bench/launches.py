"""How many operations a method adds to a step: on a GPU each is a launch, and takes time whatever its size."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_sparse import (
    ACDC,
    CHT,
    GMP,
    SNIP,
    SWAT,
    FixedMask,
    GraSP,
    LotteryTicket,
    OneShot,
    OptG,
    RandomPruning,
    SRigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.bench.networks import METHODS
from lightning_sparse.bench.trainers import fit_seconds
from lightning_sparse.compat.lightning import Callback, LightningModule
from lightning_sparse.compat.torch_private import TorchDispatchMode
from lightning_sparse.kernels import thresholds

__all__ = ["added", "launches"]

_WIDTH, _STEPS = 64, 4

#: those of ``bench.networks``, and what it does not time
ALL: dict[str, Callable[..., Callback]] = {
    **METHODS,
    "topkast": lambda: TopKAST(0.9, 0.8, update_every=1000),
    "swat": lambda: SWAT(0.9, update_every=1000),
    "optg": lambda: OptG(0.9, update_every=1000),
    "gmp": lambda: GMP(0.9, update_every=1000, begin_at=0.99, end_at=1.0),
    "cht": lambda: CHT(0.9, update_every=1000),
    "srigl": lambda: SRigL(0.9, update_every=1000),
    "oneshot": lambda: OneShot(0.9),
    "snip": lambda: SNIP(0.9),
    "grasp": lambda: GraSP(0.9),
    "synflow": lambda: SynFlow(0.9, rounds=2),
    "randompruning": lambda: RandomPruning(0.9),
    "fixedmask": lambda: FixedMask(0.9, initial="magnitude"),
    "lotteryticket": lambda: LotteryTicket(0.9, rounds=1),
    "acdc": lambda: ACDC(0.9, begin_at=0.0, last_dense=0.375, end_at=1.0, cycles=1),
}


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch's operations, also those that start nothing, and launches of Triton."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


class _Counted(Callback):
    """The number of operations of each step, its hooks included: it stands after the method in the callbacks."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.mode = _Count()  # of what is launched before the first step, too

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode = _Count()
        self.mode.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.numbers.append(self.mode.number)


class _Layers(LightningModule):
    """Linear layers of 64 neurons."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()) for _ in range(depth)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).square().mean()
        return loss

    def forward(self, batch: Tensor) -> Tensor:
        outputs: Tensor = self.net(batch)
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, foreach=True)


@contextmanager
def _triton_counted(counted: _Counted, device: str) -> Iterator[None]:
    """Count launches of Triton as well, which are no operations of torch."""
    found = thresholds.fused(torch.device(device))
    if found is None:
        yield
        return
    start = found.launch

    def launch(*args: Any, **kwargs: Any) -> None:
        counted.mode.number += 1
        start(*args, **kwargs)

    with patch.object(found, "launch", launch):
        yield


def _operations(method: Callback | None, depth: int, device: str) -> int:
    """Return the number of operations of a step in the middle of a fit."""
    torch.manual_seed(0)
    counted = _Counted()
    callbacks: list[Callback] = [counted] if method is None else [method, counted]
    with _triton_counted(counted, device):
        batch: Any = torch.randn(16, _WIDTH, device=device)
        fit_seconds(_Layers(depth), batch, _STEPS, callbacks, device=device, max_epochs=2)
    return sorted(counted.numbers)[_STEPS]


def added(method: str, depth: int, device: str = "cpu") -> int:
    """Return how many operations a method of this name adds to a step of so many layers."""
    return _operations(ALL[method](), depth, device) - _operations(None, depth, device)


def launches(arguments: argparse.Namespace) -> None:
    """Print for each method how many operations it adds to a step, of 10 and of 30 layers."""
    kernels = os.environ.get("LIGHTNING_SPARSE_KERNELS", "auto")
    print(f"operations beside a dense step, {arguments.device}, LIGHTNING_SPARSE_KERNELS={kernels}")
    for name in arguments.methods.split(","):
        few, many = (added(name, depth, arguments.device) for depth in (10, 30))
        print(f"{name:18s} 10 layers {few:4d}  30 layers {many:4d}  each more {(many - few) / 20:.1f}", flush=True)
