"""Weights divided over processes by FSDP2: trainer/test_shards.py calls these functions in each process."""

import os

import lightning.pytorch as pl
import torch
from helpers import MASKED, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import GMP, MEST, RigL
from lightning_sparse.compat.shards import whole

OPTIONS = {"seed": 3}
REFUSED = ("SNIP", "GraSP", "SynFlow")
METHODS = {name: build for name, build in MASKED.items() if name not in REFUSED} | {
    "RigL, AdamW": lambda **kw: RigL(0.8, update_every=7, **kw),
    "MEST, soft bound": lambda **kw: MEST(0.8, update_every=7, soft_bound=True, **kw),
    "GMP, layer": lambda **kw: GMP(0.8, update_every=7, scope="layer", initial="magnitude", initial_sparsity=0.3, **kw),
}


class Divided(pl.LightningModule):
    """A regression whose layers are divided over processes; of the last layers, some have rows for none."""

    def __init__(self, adam=False, dtype=torch.float64):
        super().__init__()
        self.adam = adam
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 7), nn.ReLU(), nn.Linear(7, 1)).to(dtype)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed._composable.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return ((self.net(x).squeeze(1) - y) ** 2).mean()

    def configure_optimizers(self):
        if self.adam:
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.01)
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def rows(rank, world, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(240, 12, generator=generator, dtype=dtype)
    y = x[:, :3].prod(1) + x[:, 3:6].sum(1).sin()
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), 12 // world)  # which make up global batches


def train(method, rank=0, world=1, **options):
    callback, module = METHODS[method](**OPTIONS), Divided(adam="AdamW" in method)
    if world > 1:
        options |= {"strategy": ModelParallelStrategy(world, 1), "devices": world}
    run = trainer(callback, max_epochs=3, use_distributed_sampler=False, **options)
    run.fit(module, rows(rank, world))
    return {
        "masks": {name: whole(mask) for name, mask in callback.masks.items()},
        "counts": callback.layer_count,
        "parameters": {name: whole(p.detach()) for name, p in module.named_parameters()},
    }


def run_all(folder, methods):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    results = {method: train(method, rank, world) for method in methods}
    if rank == 0:
        torch.save(results, folder / f"{world}.pt")
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
