"""Run by compat/test_lightning.py in a fresh process: ``other_package_script.py both|later``.

The program loads both packages before this one, or pytorch_lightning alone, and the second one when it has trained.
"""

# ruff: noqa: E402
import importlib
import sys
import tempfile

mode = sys.argv[1]
if mode == "both":
    importlib.import_module("lightning.pytorch")

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse

early = lightning_sparse.SparsityMonitor()


def module(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


class Data:
    """The same datamodule in either package, with a hook of its own."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1]


options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
folder = tempfile.TemporaryDirectory()
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder.name}


def train(package):
    torch.manual_seed(0)
    exceptions = importlib.import_module(f"{package.__name__}.utilities.exceptions")
    data = type("Data", (Data, package.LightningDataModule), {})()
    for callback in (lightning_sparse.SNIP(0.5), lightning_sparse.RigL(0.5, update_every=3, storage="sparse")):
        assert isinstance(callback, package.Callback)
        network = module(package)
        package.Trainer(callbacks=callback, **options, **quiet).fit(network, data)
        assert torch.equal(network.layer.weight != 0, callback.masks["layer.weight"])
    assert isinstance(early, package.Callback)
    package.Trainer(callbacks=[lightning_sparse.DST(0.1), early], **options, **quiet).fit(module(package), data)
    other = lightning_sparse.SET(0.5, exclude=["layer.weight"])
    with pytest.raises(exceptions.MisconfigurationException, match="nothing to make sparse"):
        package.Trainer(callbacks=[other], **options, **quiet).fit(module(package), data)
    print(f"sparsity {callback.sparsity}")


if mode == "later":
    train(pl)
    assert not any(name.split(".")[0] == "lightning" for name in sys.modules), "the other package is not even imported"
for package in (pl, importlib.import_module("lightning.pytorch")):
    train(package)
