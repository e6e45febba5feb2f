#!/usr/bin/env bash
# Finding: with torchdata's StatefulDataLoader, a Lightning fit that is resumed from an epoch's last step loses an epoch.
#
# Packages:  lightning 2.6.6, torchdata 0.11.0, torch 2.14.1, CPU.
# Guessed:   a loader that saves its own place resumes at least as exactly as a plain one, which does not.
# Found:     a checkpoint that is written within an epoch at its last step (ModelCheckpoint(every_n_train_steps=...))
#            holds a loader that has nothing left. The resumed fit takes it up in the next epoch, which is then empty and
#            counts: of 3 epochs with 4 steps each, the fit ends at step 8. A plain DataLoader makes all 12 steps. So
#            does either loader from a checkpoint in the middle of an epoch, or one written after its end.
# Output seen (steps at the end; 12 are planned):
#   DataLoader          step 2: 12   step 4: 12   end of the epoch: 12
#   StatefulDataLoader  step 2: 12   step 4: 8    end of the epoch: 12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 lightning==2.6.6 torchdata==0.11.0 numpy
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
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

logging.disable(logging.WARNING)
print(*(f"{name} {version(name)}" for name in ("torch", "lightning", "torchdata")), "python", sys.version.split()[0])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(loader, epochs, callbacks=(), **options):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[*callbacks], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )
    trainer.fit(Module(), loader(TensorDataset(torch.arange(8.0).view(8, 1)), batch_size=2), **options)
    return trainer.global_step


def resumed(loader, step, **when):
    """Return at which step a fit of three epochs ends that goes on from a checkpoint of its first epoch."""
    with tempfile.TemporaryDirectory() as where:
        fit(loader, 1, [ModelCheckpoint(where, save_top_k=-1, filename="{step}", **when)])
        return fit(loader, 3, ckpt_path=Path(where, f"step={step}.ckpt"))


cases = {
    "step 2": (2, {"every_n_train_steps": 2}),
    "step 4": (4, {"every_n_train_steps": 4}),
    "end of the epoch": (4, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
}
found = {}
for loader in (DataLoader, StatefulDataLoader):
    found[loader.__name__] = [resumed(loader, step, **when) for step, when in cases.values()]
    print(f"{loader.__name__:19s}", *(f"{name}: {end:<4d}" for name, end in zip(cases, found[loader.__name__])))
expected = {"DataLoader": [12, 12, 12], "StatefulDataLoader": [12, 8, 12]}
sys.exit("the behaviour has changed" if found != expected else None)
PYTHON
