"""What a run costs: time of a step and memory."""

import math
from collections.abc import Mapping

import torch

from lightning_sparse.accounting.memory import peak_memory
from lightning_sparse.compat.lightning import LightningModule, Trainer

__all__ = ["highest"]


def highest(
    trainer: Trainer, module: LightningModule, seconds: float | None, stored: Mapping[str, int]
) -> tuple[float | None, int | None, dict[str, int]]:
    """Return the time of a step, peak memory and stored bytes, of several processes the largest; all call this.

    Args:
        trainer: of the run.
        module: on the device whose memory is meant.
        seconds: the time of a step in this process; None: not known.
        stored: bytes in this process, by name.
    """
    values = [math.nan if seconds is None else seconds, _peak(module.device), *map(float, stored.values())]
    if trainer.world_size > 1:
        all_values = torch.tensor(values, dtype=torch.float64, device=module.device)
        values = trainer.strategy.reduce(all_values, reduce_op="max").tolist()
    seconds, peak, *held = values
    return (
        None if math.isnan(seconds) else seconds,
        None if math.isnan(peak) else round(peak),
        dict(zip(stored, map(round, held), strict=True)),
    )


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return peak_memory() if device.type == "cpu" else math.nan
