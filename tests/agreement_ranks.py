"""Processes whose callbacks differ: test_agreement.py calls ``run_all`` in each, which the environment numbers."""

import os

import lightning.pytorch as pl
import torch
from helpers import Lit, loader, mlp, trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import DST, SET, RigL

CASES = {
    "seed": lambda rank: SET(0.8, seed=rank),
    "sparse": lambda rank: SET(0.8, seed=rank, storage="sparse"),
    "alpha": lambda rank: DST(alpha=1e-3 * (rank + 1)),
    "exclude": lambda rank: RigL(0.8, exclude=["net.0.*"] if rank else []),
    "method": lambda rank: SET(0.8) if rank else RigL(0.8),
    "none": lambda rank: RigL(0.8, update_every=5),
}


class Stops(pl.Callback):
    """Ends the fit before a process runs out of batches, and notes how long it was to be."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps = trainer.callbacks[0].total_steps
        trainer.should_stop = trainer.global_step == 8


def run_all(folder):
    rank, found = int(os.environ["LOCAL_RANK"]), {}
    for name, build in CASES.items():
        torch.manual_seed(rank)
        callback, strategy = build(rank), DDPStrategy(process_group_backend="gloo")
        run = trainer(callback, max_epochs=1, devices=2, strategy=strategy)
        try:
            run.fit(Lit(mlp()), loader(80))
            found[name] = callback.masks
        except MisconfigurationException as error:
            found[name] = str(error)
    stops = Stops()
    callbacks, strategy = (
        [RigL(0.8, update_every=3, storage="sparse"), stops],
        DDPStrategy(process_group_backend="gloo"),
    )
    uneven = trainer(callbacks, max_epochs=1, devices=2, strategy=strategy, use_distributed_sampler=False)
    uneven.fit(Lit(mlp()), loader(64 if rank else 80))
    found["uneven"] = stops.steps, uneven.num_training_batches
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
