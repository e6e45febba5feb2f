"""What Lightning's ModelPruning does on a resume, over the epochs and in a checkpoint, beside this package's methods.

``python docs/model_pruning.py`` prints the figures of docs/guides/model-pruning.md. It takes some seconds on a CPU.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import GMP, FixedMask

EPOCHS, STEPS = 4, 8


class Module(pl.LightningModule):
    """One layer of 64 x 64 that learns to copy its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return (self.layer(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Shares(pl.Callback):
    """Notes the share of zeros at the end of each epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note it."""
        self.found.append(float((pl_module.layer.weight == 0).float().mean()))


def lightnings(module: Module, amount: Any, permanent: bool = True) -> pl.Callback:
    """Return ModelPruning, with the weights of the layer to prune by magnitude."""
    return ModelPruning(
        "l1_unstructured",
        [(module.layer, "weight")],
        amount=amount,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=permanent,
    )


def fit(pruning: Callable[[Module], pl.Callback], folder: str, epochs: int = EPOCHS, **options: Any) -> Module:
    """Return the module after a fit, with what it has in ``shares``; the last checkpoint is ``folder/last.ckpt``."""
    pl.seed_everything(0, verbose=False)
    module, shares = Module(), Shares()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[pruning(module), shares, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8 * STEPS, 64)), 8), **options)
    module.shares = shares.found
    return module


def resumed(pruning: Callable[[Module], pl.Callback]) -> list[float]:
    """Return the shares of zeros after the last epoch: of one fit, and of a fit that is resumed in the middle."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        fit(pruning, parts, EPOCHS // 2)
        last = Path(parts, "last.ckpt")
        runs = fit(pruning, whole), fit(pruning, parts, ckpt_path=last, weights_only=False)
        return [run.shares[-1] for run in runs]


def over_epochs(pruning: Callable[[Module], pl.Callback]) -> list[float]:
    """Return the shares of zeros after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        return fit(pruning, folder).shares


def keys(pruning: Callable[[Module], pl.Callback]) -> list[str]:
    """Return the names in the last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        fit(pruning, folder)
        return list(torch.load(Path(folder, "last.ckpt"), weights_only=False)["state_dict"])


def line(shares: list[float]) -> str:
    """Return shares with three digits."""
    return "  ".join(f"{share:.3f}" for share in shares)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(*(f"{name} {version(name)}" for name in ("torch", "lightning")))
    once: Callable[[int], float] = lambda epoch: 0.5 if epoch == 0 else 0.0  # noqa: E731
    print("Pruned to 0.5 in the first epoch, then trained on: zeros at the end of one fit, and of a resumed one")
    print(f"  ModelPruning            {line(resumed(lambda module: lightnings(module, once)))}")
    print(f"  FixedMask               {line(resumed(lambda module: FixedMask(0.5, initial='magnitude')))}")
    print("Zeros after each epoch")
    print(f"  ModelPruning(amount=0.5) {line(over_epochs(lambda module: lightnings(module, 0.5)))}")
    print(f"  GMP(sparsity=0.5)        {line(over_epochs(lambda module: GMP(0.5, update_every=2)))}")
    print("Names in the checkpoint")
    print(f"  ModelPruning(make_pruning_permanent=False)  {keys(lambda module: lightnings(module, once, False))}")
    print(f"  FixedMask                                   {keys(lambda module: FixedMask(0.5, initial='magnitude'))}")
