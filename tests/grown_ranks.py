"""Growth under AdamW in several processes: families/test_grown_connections.py calls ``run_all`` in each."""

import os

import torch
from helpers import Lit, mlp, trainer
from stored_ranks import rows, strategy

from lightning_sparse import SET, RigL

METHODS = {
    "RigL": lambda: RigL(0.8, update_every=5, seed=3),
    "SET": lambda: SET(0.8, update_every=5, seed=3, storage="sparse"),
}


def train(method, rank=0, world=1):
    options = {"devices": world, "use_distributed_sampler": False, "max_epochs": 1}
    if world > 1:
        options["strategy"] = strategy()
    run = trainer(METHODS[method](), **options)
    torch.manual_seed(rank)  # the first process's values count
    module = Lit(mlp(torch.float64), lambda p: torch.optim.AdamW(p, 0.01))
    run.fit(module, rows(rank, world))
    return {"parameters": module.state_dict(), "optimizer": run.optimizers[0].state_dict()["state"]}


def run_all(folder):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.save({method: train(method, rank, world) for method in METHODS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
