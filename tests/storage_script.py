"""Run by test_sparse_storage.py in each of two processes; the environment numbers them."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers import Lit, data, mlp, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SET, RigL

METHODS = {"SET": SET, "RigL": RigL}


class Communicates(pl.Callback):
    """Count the bytes of gradients that a step averages."""

    def on_train_start(self, run, module):
        self.bytes = 0
        run.model.register_comm_hook(None, self.averaged)

    def averaged(self, state, bucket):
        self.bytes += bucket.buffer().nbytes
        world = torch.distributed.get_world_size()
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0].div_(world))


def train(method, storage, rank, world):
    torch.manual_seed(rank)
    x, y = data(240, torch.float64)
    mine = TensorDataset(x[rank::world], y[rank::world])  # the ranks' rows make up global batches
    callback, counter = METHODS[method](0.8, update_every=5, seed=3, storage=storage), Communicates()
    options = {"devices": world, "use_distributed_sampler": False, "accumulate_grad_batches": 2, "max_epochs": 2}
    if world > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    run = trainer([callback, counter] if world > 1 else callback, **options)
    torch.manual_seed(0)
    module = Lit(mlp(torch.float64))
    run.fit(module, DataLoader(mine, 12 // world))
    return {"parameters": module.state_dict(), "masks": callback.masks, "bytes": getattr(counter, "bytes", 0)}


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    results = {
        method: {storage: train(method, storage, rank, 2) for storage in ("masked", "sparse")} for method in METHODS
    }
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
