"""What each process holds of a network whose weights are divided over processes by FSDP2."""

import argparse
import os
import socket
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import RigL
from lightning_sparse.bench.measure import hardware
from lightning_sparse.bench.networks import Decoder
from lightning_sparse.compat.lightning import PACKAGE, LightningModule, Trainer
from lightning_sparse.compat.shards import local

__all__ = ["shards"]

_LAYERS = 3


class _Sharded(LightningModule):
    """A network that is made on the meta device and divided before it has values.

    Args:
        parts: divided each by itself, one after the other.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*parts)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(self.global_rank)  # other numbers on each process
        for layer in (*self.net, self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class _Perceptron(_Sharded):
    """Square layers."""

    update_every = 1

    def __init__(self, width: int) -> None:
        with torch.device("meta"):
            super().__init__(*(nn.Linear(width, width) for _ in range(_LAYERS)))
        self.data = DataLoader(TensorDataset(torch.randn(12, width)), 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x: Tensor = self.net(batch[0])
        return x.square().mean()


class _LanguageModel(_Sharded):
    """A decoder that learns random text, one sequence a step and process."""

    update_every = 3

    def __init__(self, width: int) -> None:
        with torch.device("meta"):
            decoder = Decoder()
            super().__init__(decoder.embedding, *decoder.blocks, decoder.head)
        text = torch.randint(Decoder.VOCABULARY, (10, Decoder.CONTEXT + 1))
        self.data = DataLoader(TensorDataset(text))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


def shards(arguments: argparse.Namespace) -> None:
    """Train RigL with AdamW on several processes; print what each holds between steps, in MiB."""
    decoder = arguments.network == "decoder"
    layers = f"{_LAYERS} layers of {arguments.width} x {arguments.width}"
    print(hardware(arguments.device))
    print(f"{Decoder.__doc__ if decoder else layers}\nfloat32, RigL(0.9), AdamW")
    for ranks in map(int, arguments.processes.split(",")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        kind = _LanguageModel if decoder else _Perceptron
        torch.multiprocessing.spawn(_train, (ranks, variables, kind, arguments.width), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]


def _train(rank: int, ranks: int, variables: dict[str, str], kind: type[Any], width: int) -> None:
    import importlib

    os.environ.update(variables, LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    strategies: Any = importlib.import_module(f"{PACKAGE}.strategies")
    module = kind(width)
    callback = RigL(0.9, update_every=module.update_every)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies.ModelParallelStrategy(ranks, 1),
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, module.data)
    parameters = [local(parameter) for parameter in module.parameters()]
    states = [local(x) for state in trainer.optimizers[0].state.values() for x in state.values()]
    masks = [weight.mask for weight in callback._weights.values()]
    size = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{ranks} processes, rank {rank}: {size} parameters on all, here in MiB "
        f"{_mebibytes(parameters)}, masks {_mebibytes(masks)}, "
        f"optimizer {_mebibytes(states)}, together {_mebibytes([*parameters, *masks, *states])}, "
        f"steps {trainer.global_step}, density {callback.density:.6f}",
        flush=True,
    )
    torch.distributed.destroy_process_group()


def _mebibytes(tensors: Iterable[Tensor]) -> str:
    return f"{sum(x.nbytes for x in tensors) / 2**20:.1f}"
