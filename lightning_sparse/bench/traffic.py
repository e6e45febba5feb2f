"""What processes send each other in a step."""

import argparse
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_sparse import SET, MemoryEfficientDST
from lightning_sparse.bench.networks import NETWORKS, batch_for
from lightning_sparse.bench.trainers import Plain, fit_seconds
from lightning_sparse.compat.lightning import PACKAGE, Callback, LightningModule, Trainer

__all__ = ["Traffic", "traffic"]


class Traffic(Callback):
    """Counts the bytes that a process hands over to be averaged or summed in each step: by DDP and by callbacks.

    Args:
        path: file to which the first process writes the list when the training ends; default: none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        #: bytes of each optimizer step
        self.steps: list[int] = []
        self._bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to DDP and to ``torch.distributed.all_reduce``."""
        self._all_reduce = distributed.all_reduce
        distributed.all_reduce = self._counted
        model: Any = trainer.strategy.model
        model.register_comm_hook(None, lambda state, bucket: self._averaged(bucket))  # DDP reads annotations

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Forget what was sent before the first step."""
        if trainer.global_step == 0:
            self._bytes = 0

    def on_before_zero_grad(self, *args: Any) -> None:
        """Begin a step."""
        if self._bytes:
            self.steps.append(self._bytes)
        self._bytes = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer."""
        self.on_before_zero_grad()
        distributed.all_reduce = self._all_reduce
        if self.path is not None and trainer.is_global_zero:
            torch.save(self.steps, self.path)

    def _counted(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._bytes += tensor.nbytes
        return self._all_reduce(tensor, *args, **kwargs)

    def _averaged(self, bucket: Any) -> torch.futures.Future[Tensor]:
        self._bytes += bucket.buffer().nbytes
        sent: Any = self._all_reduce(bucket.buffer(), async_op=True)
        averaged: torch.futures.Future[Tensor] = sent.get_future().then(
            lambda future: future.value()[0].div_(distributed.get_world_size())
        )
        return averaged


def traffic(arguments: argparse.Namespace) -> None:
    """Print the bytes that each of two processes (gloo) hands over in a step, dense and with ``storage="sparse"``."""
    DDPStrategy = import_module(f"{PACKAGE}.strategies").DDPStrategy
    build, batch = NETWORKS[arguments.network][0], batch_for(arguments.network, arguments.batch)

    def sent(callbacks: list[Callback]) -> list[int]:
        with TemporaryDirectory() as folder:
            strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
            traffic = Traffic(Path(folder) / "steps")
            options: dict[str, Any] = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
            fit_seconds(Plain(build()), batch, 6, [*callbacks, traffic], **options)
            steps: list[int] = torch.load(Path(folder) / "steps")
        return steps

    dense = min(sent([]))
    print(f"{arguments.network}, two processes, torch {torch.__version__}; bytes of a step, over those of a dense one")
    print(f"dense: {dense}")
    options: dict[str, Any] = {"distribution": "uniform", "update_every": 3, "stop_at": 1.0}
    for sparsity in map(float, (arguments.sparsities or "0.9,0.98").split(",")):
        for method in (SET, MemoryEfficientDST):
            steps = sent([method(sparsity, storage="sparse", **options)])
            print(
                f"{sparsity:<8g}  {method.__name__:20s}{min(steps):12d} ({min(steps) / dense:.4f}); "
                f"when connections move {max(steps):12d} ({max(steps) / dense:.4f})",
                flush=True,
            )
