"""Layers whose dense weight would take gigabytes: tests call these functions in fresh processes and read the memory."""

import lightning.pytorch as pl
import torch
from helpers import trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparse import MemoryEfficientDST
from lightning_sparse.accounting.memory import peak_memory, resident_memory
from lightning_sparse.storage import SparseConv2d, SparseLinear


def train(layer, *shape):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(*shape, requires_grad=True)).square().mean().backward()
        optimizer.step()


def added_by_training(kind):
    """Return the memory that training a layer adds, and that of its dense weight, in bytes."""
    train(SparseLinear(8, 8, 9), 2, 8)
    train(SparseConv2d(4, 4, 3, 9), 2, 4, 5, 5)
    before = resident_memory()
    if kind == "linear":
        train(SparseLinear(20_000, 20_000, 40_000), 4, 20_000)
        return peak_memory() - before, 4 * 20_000**2
    train(SparseConv2d(4000, 4000, 3, 40_000), 1, 4000, 3, 3)
    return peak_memory() - before, 4 * 4000**2 * 9


class Wide(pl.LightningModule):
    def configure_model(self):
        with torch.device("meta"):
            self.layer = nn.Linear(65536, 65536, bias=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def peak_of_65536_by_65536():
    """Return the peak memory of a process that trains such a layer and moves connections, in bytes."""
    callback = MemoryEfficientDST(0.9999, update_every=1, stop_at=1.0, storage="sparse")
    module = Wide()
    trainer(callback, max_epochs=None, max_steps=3).fit(module, DataLoader(torch.randn(12, 65536), batch_size=4))
    assert type(module.layer) is SparseLinear
    assert module.layer.nnz == 2**32 - round(0.9999 * 2**32)
    return peak_memory()
