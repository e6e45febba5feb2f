"""Run by test_data.py: ``data_script.py DIRECTORY`` trains in one process, then in two, and notes the batches."""

import sys
from pathlib import Path

import torch
from helpers import pl, trainer

from lightning_sparse.data import DigitsDataModule
from lightning_sparse.models import LeNet300


class Recorder(pl.Callback):
    def __init__(self, folder):
        self.folder = folder
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, sorted(batch[0].flatten(1).mean(1).tolist())))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(("val", trainer.current_epoch, len(batch[1])))

    def on_fit_end(self, trainer, pl_module):
        torch.save(self.seen, f"{self.folder}/{trainer.global_rank}.pt")


def fit(folder, batch_size, **kwargs):
    folder.mkdir()
    run = trainer(Recorder(folder), num_sanity_val_steps=0, **kwargs)
    run.fit(LeNet300(inputs=64, hidden=(4, 4)), DigitsDataModule(batch_size=batch_size, seed=0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    fit(folder / "two", 400, strategy="ddp_fork", devices=2)
    fit(folder / "one", 800)
