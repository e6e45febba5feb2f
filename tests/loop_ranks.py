"""Processes that train in loops of their own: test_loop.py calls ``run_all`` in each, which the environment numbers."""

import os

import torch
from helpers import data, mlp, state
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_sparse import DFBST, RigL, attach

METHODS = {"RigL": lambda: RigL(0.8, update_every=7), "DFBST": lambda: DFBST(alpha=5e-3, beta=0.5)}
STEPS, GLOBAL_BATCH = 30, 12


def train(method, rank=0, world=1):
    torch.manual_seed(0)
    module = mlp(torch.float64)
    if world > 1:
        module = DistributedDataParallel(module)
        torch.manual_seed(rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    x, y = data(GLOBAL_BATCH * STEPS, torch.float64)
    with attach(METHODS[method](), module, optimizer, steps=STEPS, steps_per_epoch=10) as sparse:
        for i in range(STEPS):
            mine = slice(i * GLOBAL_BATCH + rank, (i + 1) * GLOBAL_BATCH, world)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[mine]), y[mine]).backward()
            optimizer.step()
    return state(sparse.method) | dict(sparse.masks)


def run_all(folder):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save({method: train(method, rank, world) for method in METHODS}, folder / f"{rank}.pt")
    distributed.destroy_process_group()
