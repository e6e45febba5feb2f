"""Training in one process, then in two: test_data.py calls ``run_all`` in a fresh process and reads the batches.

Once with images as they are, and once with augmented ones.
"""

import torch
from helpers import pl, trainer

from lightning_sparse.zoo.data import ByteImages, DigitsDataModule, ImageDataModule
from lightning_sparse.zoo.models import LeNet300


class Augmented(ImageDataModule):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (90, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.train = ByteImages(images, torch.arange(90) % 10, [0.5], [0.5], padding=2, flip=True, rotation=30)
        self.val = self.test = ByteImages(images[:60], torch.arange(60) % 10, [0.5], [0.5])


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


def fit(folder, data, **kwargs):
    folder.mkdir(parents=True)
    run = trainer(Recorder(folder), num_sanity_val_steps=0, **kwargs)
    run.fit(LeNet300(inputs=64, hidden=(4, 4)), data)


def run_all(folder):
    fit(folder / "plain" / "two", DigitsDataModule(400, seed=0), strategy="ddp_fork", devices=2)
    fit(folder / "augmented" / "two", Augmented(20, 0, 100), strategy="ddp_fork", devices=2)
    fit(folder / "plain" / "one", DigitsDataModule(800, seed=0))
    fit(folder / "augmented" / "one", Augmented(40, 0, 100))
