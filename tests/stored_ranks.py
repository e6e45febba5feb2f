"""Sparse layers in several processes: test_sparse_processes.py calls ``run_all`` in each."""

import os

import torch
from helpers import PLAINLY, Lit, SavesFirst, Scaler, Unmixed, data, mlp, prune, seeded, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DSR, GGR, ITOP, MEST, SET, FixedMask, MemoryEfficientDST, RigL
from lightning_sparse.bench.traffic import Traffic
from lightning_sparse.storage.processes import average_gradients

OPTIONS = {"sparsity": 0.8, "update_every": 5, "seed": 3}
METHODS = {
    "SET masked": lambda: SET(**OPTIONS),
    "SET": lambda: SET(**OPTIONS, storage="sparse"),
    "grabo": lambda: MemoryEfficientDST(**OPTIONS, stop_at=0.9, storage="sparse"),
    "synflow": lambda: MemoryEfficientDST(**OPTIONS, stop_at=0.9, heuristic="synflow", storage="sparse"),
    "RigL": lambda: RigL(**OPTIONS, storage="sparse"),
    "GGR": lambda: GGR(**OPTIONS, drop_fraction=0.3, stop_at=0.9, storage="sparse"),
    "ITOP": lambda: ITOP(**OPTIONS, storage="sparse"),
    "MEST": lambda: MEST(**OPTIONS, storage="sparse"),
    "MEST soft bound": lambda: MEST(**OPTIONS, soft_bound=True, storage="sparse"),
    "DSR": lambda: DSR(**OPTIONS, init_threshold=0.05, storage="sparse"),
    "FixedMask": lambda: FixedMask(0.8, initial="magnitude", storage="sparse"),
    "blocks": lambda: SET(**OPTIONS, pattern="block:2x2", storage="block"),
}
CASES = [("grabo", 1), *((name, 2) for name in METHODS)]


class Fails(Lit):
    """The loss of one process is not finite in one batch; another has no use for a layer."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_rank == 1 and batch_idx == 3 else loss

    def forward(self, x):
        return super().forward(x) if self.global_rank == 0 else self.net[4](x[:, :10])


def strategy(**options):
    return DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True, **options)


def rows(rank, world):
    x, y = data(192, torch.float64)
    mine = TensorDataset(x[rank::world], y[rank::world])  # the ranks' rows make up global batches
    return DataLoader(mine, 12 // world)


def train(method, accumulate, rank, world, saves=None, resumes=None):
    callback, counter = METHODS[method](), Traffic()
    options = {"devices": world, "use_distributed_sampler": False, "accumulate_grad_batches": accumulate}
    if world > 1:
        options["strategy"] = strategy()
    callbacks = [callback, *([counter] if world > 1 else []), *([SavesFirst(saves)] if saves else [])]
    run = trainer(callbacks, max_epochs=2, **options)
    torch.manual_seed(rank if resumes is None else 50 + rank)  # the first process's values count
    module = Lit(mlp(torch.float64))
    run.fit(module, rows(rank, world), ckpt_path=resumes, **(PLAINLY if resumes else {}))
    state = run.optimizers[0].state_dict()["state"].values()
    return {
        "parameters": module.state_dict(),
        "masks": callback.masks,
        "momentum": [entry["momentum_buffer"] for entry in state],
        "bytes": counter.steps,
    }


def fail(rank, world):
    """Train with a scaler, unused layers and an overflow that one process alone sees."""
    callback, scaler = METHODS["grabo"](), Scaler()
    options = {"devices": world, "use_distributed_sampler": False, "max_epochs": 1}
    run = trainer(callback, strategy=strategy(find_unused_parameters=True), plugins=Unmixed(scaler), **options)
    torch.manual_seed(0)
    module = Fails(mlp(torch.float64))
    run.fit(module, rows(rank, world))
    return {"parameters": module.state_dict(), "masks": callback.masks, "skipped": scaler.skipped}


def keep_zeros(storage, rank, world):
    """Train a sparse network on."""
    net = prune(seeded(lambda: mlp(torch.float64))).train()
    before = {f"net.{name}": p != 0 for name, p in net.named_parameters() if p.ndim > 1}
    callback, module = FixedMask(storage=storage), Lit(net, lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1))
    run = trainer(callback, strategy=strategy(), devices=world, use_distributed_sampler=False, max_epochs=1)
    run.fit(module, rows(rank, world))
    return {"parameters": module.state_dict(), "masks": callback.masks, "before": before}


def averages(rank, world):
    """Average gradients of which some processes have none."""
    used, unused, partly, single = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(4))
    single.data = single.data.float()
    used.grad = torch.full_like(used, rank + 1.0)
    single.grad = torch.full_like(single, float("inf") if rank else 1.0)
    if rank == 0:
        partly.grad = torch.full_like(partly, 6.0)
    average_gradients([used, unused, partly, single])
    return [parameter.grad for parameter in (used, unused, partly, single)]


def run_all(folder):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for method, accumulate in CASES if world == 2 else CASES[:1]:
        results[method, accumulate] = train(method, accumulate, rank, world, saves=folder / f"{method}.ckpt")
    if world == 2:
        results["resumed"] = train("grabo", 2, rank, world, resumes=folder / "grabo.ckpt")
        results["failed"] = fail(rank, world)
        results["zeros"] = {storage: keep_zeros(storage, rank, world) for storage in ("masked", "sparse")}
    results["averages"] = averages(rank, world)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
