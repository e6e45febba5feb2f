"""Growth in two processes: test_memory_efficient_dst.py calls ``run_all`` in each, which the environment numbers."""

import warnings

import lightning.pytorch as pl
import torch
from helpers import Lit, loader, seeded, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_sparse import MemoryEfficientDST
from lightning_sparse.families.subsets import Subsets


class Holds(Lit):
    """Has its layers beside one another, and a forward of its own."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Records(MemoryEfficientDST):
    """Keep f and g of each update."""

    ends = ()

    def __post_init__(self):
        super().__post_init__()
        self._subsets = Kept(self)


class Kept(Subsets):
    def endpoints(self, weights):
        found = super().endpoints(weights)
        self.method.ends = (*self.method.ends, found)
        return found


class Agrees(pl.Callback):
    """Compare processes after every step."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        everywhere = trainer.strategy.all_gather
        batches, masks = everywhere(batch[0]), self.callback.masks.values()
        assert not torch.equal(batches[0], batches[1]), "each has data of its own"
        found = [mask.double() for mask in masks] + list(pl_module.parameters())
        found += [of[key] for ends in self.callback.ends for of in ends.values() for key in "fg"]
        for x in found:
            every = everywhere(x.detach())
            assert torch.equal(every[0], every[1])

    def on_train_end(self, trainer, pl_module):
        assert len(self.callback.ends) == 2
        for ends in self.callback.ends:
            assert ends.keys() == {"first.weight", "second.weight"}
            assert ends["first.weight"]["g"].std() > 0, "the heuristic has told units apart"
        for module in pl_module.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def run_all():
    warnings.filterwarnings("error", ".*draws the endpoints")
    for heuristic in ("grabo", "synflow"):
        callback = Records(0.5, heuristic=heuristic, update_every=4, stop_at=0.9)
        strategy = DDPStrategy(process_group_backend="gloo")
        run = trainer([callback, Agrees(callback)], max_epochs=1, strategy=strategy, devices=2)
        run.fit(seeded(Holds), loader(160))
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
