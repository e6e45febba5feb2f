"""Training in several processes: test_ddp.py calls ``run_all`` in each, which the environment numbers."""

import os
import warnings

import lightning.pytorch as pl
import torch
from helpers import HOOKED, REPRESENTATIVES, ROUNDS, SETTINGS, Lit, data, mlp, state, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DFBST, STR

GLOBAL_BATCH = 12
TARGETS = {
    "DFBST with a target": lambda: DFBST(sparsity=0.8, beta=0.5, min_layer_density=0.05),
    "STR with a target": lambda: STR(sparsity=0.8),
}
PATTERNS = {"RigL 1:2": lambda: SETTINGS["RigL"](pattern="1:2")}
METHODS = {**SETTINGS, **ROUNDS, **TARGETS, **PATTERNS}
ACCUMULATED = (*REPRESENTATIVES, *HOOKED, *ROUNDS, *TARGETS)


def cases(method, world):
    """Return how many batches are accumulated, and whether gradients are views of buckets, of each training."""
    return [(1, False), (3, True)] if world == 2 and method in ACCUMULATED else [(1, False)]


def epochs(method):
    """Return how many epochs a training has: rounds need more."""
    return 3 if method in ROUNDS else 2


class EpochEnds(pl.Callback):
    """Keep the state after every epoch."""

    def __init__(self, callback):
        self.callback, self.ends = callback, []

    def on_train_epoch_end(self, trainer, pl_module):
        callback = self.callback
        kinds = {"masks": callback.masks, "state": state(callback), "parameters": pl_module.state_dict()}
        self.ends.append({kind: {name: x.clone() for name, x in values.items()} for kind, values in kinds.items()})


def train(method, accumulate, rank=0, **options):
    torch.manual_seed(rank)
    if rank:  # so that ranks do not draw the same even where they start from the same seed
        torch.rand(rank)
    callback = METHODS[method]()
    ends = EpochEnds(callback)
    module = Lit(mlp(torch.float64), scheduler=lambda o: StepLR(o, 1, 0.5))
    options |= {"accumulate_grad_batches": accumulate, "max_epochs": epochs(method), "use_distributed_sampler": False}
    fit = trainer([callback, ends], **options)
    x, y = data(240, torch.float64)
    mine = TensorDataset(x[rank :: fit.world_size], y[rank :: fit.world_size])  # the ranks' rows make up global batches
    fit.fit(module, DataLoader(mine, GLOBAL_BATCH // fit.world_size))
    return ends.ends


def run_all(folder, method):
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for accumulate, view in cases(method, world):
            strategy = DDPStrategy(
                process_group_backend="gloo", find_unused_parameters=False, gradient_as_bucket_view=view
            )
            logger = CSVLogger(folder, name="logs", version=f"{accumulate}")
            results[accumulate] = train(
                method, accumulate, rank, strategy=strategy, devices=world, logger=logger, log_every_n_steps=5
            )
    results["warnings"] = [str(warning.message) for warning in caught]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
