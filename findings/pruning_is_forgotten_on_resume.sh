#!/usr/bin/env bash
# Finding: a Lightning fit with ModelPruning that is resumed trains its pruned weights again and ends less sparse.
#
# Packages:  lightning 2.6.6 (ModelPruning), torch 2.14.1 (torch.nn.utils.prune), CPU.
# Guessed:   a resumed fit ends where the uninterrupted one does; a checkpoint holds masks, as it does optimizer states.
# Found:     ModelPruning has no state, and by default a checkpoint holds zeros in plain weights, without masks. The
#            resumed fit begins with masks of ones: what was pruned trains on. A network that was pruned once, in
#            epoch 0, and fine-tuned ends dense, without a warning. One that is halved after each epoch (`amount` counts
#            what is left, so 0.5, 0.75, 0.875) ends at 0.5, as if it had just begun. With
#            make_pruning_permanent=False the masks are in the checkpoint, but loading it raises: the names
#            weight_orig and weight_mask do not exist yet when weights are restored.
# Output seen (share of zeros after 3 epochs):
#   pruned once by half     in one go 0.500    resumed after 2 epochs 0.000
#   halved each epoch       in one go 0.875    resumed after 2 epochs 0.500
#   masks in checkpoints    RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 lightning==2.6.6 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.WARNING)
print(*(f"{name} {version(name)}" for name in ("torch", "lightning")), "python", sys.version.split()[0])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs, amount, permanent, **options):
    """Return the share of zeros at the end of a fit."""
    torch.manual_seed(0)
    module = Module()
    pruning = ModelPruning(
        "l1_unstructured", [(module.layer, "weight")], amount=amount, use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=permanent,
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[pruning, ModelCheckpoint(folder, save_last=True)],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, 64)), batch_size=8), **options)
    return (module.layer.weight == 0).float().mean().item()


def resumed(amount, permanent=True):
    """Return the shares of zeros after three epochs in one go, and after two and a third."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        fit(parts, 2, amount, permanent)
        last = Path(parts, "last.ckpt")
        return fit(whole, 3, amount, permanent), fit(parts, 3, amount, permanent, ckpt_path=last, weights_only=False)


cases = {"pruned once by half": lambda epoch: 0.5 if epoch == 0 else 0.0, "halved each epoch": 0.5}
found = []
for name, amount in cases.items():
    found.append([round(share, 3) for share in resumed(amount)])
    print(f"{name:23s} in one go {found[-1][0]:.3f}    resumed after 2 epochs {found[-1][1]:.3f}")
try:
    resumed(0.5, permanent=False)
    raised = None
except RuntimeError as error:
    raised = type(error).__name__
print(f"{'masks in checkpoints':23s} {raised}")
sys.exit("the behaviour has changed" if found != [[0.5, 0.0], [0.875, 0.5]] or raised is None else None)
PYTHON
