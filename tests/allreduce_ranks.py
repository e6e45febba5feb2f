"""Processes that send the gradients of connections alone: test_allreduce.py calls ``run_all`` in each."""

import os
import warnings

import torch
from helpers import SETTINGS, Lit, data, state, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import MaskedAllreduce

METHODS = ("RigL", "SET", "MemoryEfficientDST", "GMP", "SNFS", "DST")


class Counts(MaskedAllreduce):
    """How many gradients each step has sent."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def on_train_batch_end(self, *_):
        self.sent.append(self.elements)


def wide():
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).double()


def train(method, beside, rank, world, **options):
    torch.manual_seed(0)
    callback = SETTINGS[method]()
    run = trainer(
        [callback, *beside],
        strategy=DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
        devices=world,
        use_distributed_sampler=False,
        max_epochs=world - 1,  # three processes make fewer steps of an epoch: too few for an update
        **options,
    )
    x, y = data(240, torch.float64)
    module = Lit(wide())
    run.fit(module, DataLoader(TensorDataset(x[rank::world], y[rank::world]), 4))
    return state(callback) | {f"weight {name}": x.clone() for name, x in module.state_dict().items()}


def run_all(folder):
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for method in METHODS:
        counts = Counts()
        plain = train(method, [], rank, world, accumulate_grad_batches=2)
        masked = train(method, [counts], rank, world, accumulate_grad_batches=2)
        found[method] = plain, masked, counts.sent
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
