"""A whole program as a user writes it: run in a process of its own, it prints its peak of memory.

``python program.py KIND SPARSITY WIDTH BATCH STEPS THREADS`` trains three layers of ``WIDTH`` for two epochs of
``STEPS``, with SGD with momentum and a checkpoint an epoch. It prints the MB that the process has at its peak above
what it has once torch and Lightning are imported: kernels, checkpoints and the fit's end count. ``KIND`` is
``dense``, ``masked`` or ``sparse``. Linux only.
"""

import logging
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Network(lightning.LightningModule):
    """Three layers, made in ``configure_model``, without values where ``device`` is ``"meta"``."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.width, self.made_on = width, device

    def configure_model(self) -> None:
        """Make the layers."""
        with torch.device(self.made_on):
            a, b, c = (nn.Linear(self.width, self.width) for _ in range(3))
        self.network = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(kind: str, sparsity: float, width: int, batch: int, steps: int, folder: str) -> None:
    """Fit for two epochs, in the middle of each of which connections move."""
    callbacks: list[Any] = []
    if kind != "dense":
        from lightning_sparse import SET

        options: dict[str, Any] = {"distribution": "uniform", "update_every": max(1, steps // 2), "storage": kind}
        callbacks.append(SET(sparsity, **options))
    data = TensorDataset(torch.randn(steps * batch, width), torch.randint(10, (steps * batch,)))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(width, "meta" if kind == "sparse" else "cpu"), DataLoader(data, batch))


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB.

    Unlike ``ru_maxrss`` it does not begin with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024e-6 * float(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    before = peak()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kind, sparsity, *sizes, threads = sys.argv[1:]
    width, batch, steps = map(int, sizes)
    torch.set_num_threads(int(threads))
    with TemporaryDirectory() as folder:
        train(kind, float(sparsity), width, batch, steps, folder)
    print(peak() - before)
