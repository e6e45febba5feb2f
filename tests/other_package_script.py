"""Run by compat/test_lightning.py in a fresh process: ``other_package_script.py mixed|alone|forced``."""

# ruff: noqa: E402
import importlib
import sys

mode = sys.argv[1]
if mode == "mixed":  # the user's other import
    importlib.import_module("lightning.pytorch")

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


torch.manual_seed(0)
callback = lightning_sparse.DST(alpha=0.05)
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[callback],
)
data = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4)
module = Module()
try:
    trainer.fit(module, data)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    assert torch.equal(module.layer.weight != 0, callback.masks["layer.weight"])
    print(f"sparsity {callback.sparsity}")
if mode == "alone":
    assert not any(name.split(".")[0] == "lightning" for name in sys.modules), "the other package is not even imported"
