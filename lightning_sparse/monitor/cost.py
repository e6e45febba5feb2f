"""What a run costs: time of a step and peak memory."""

import math

import torch

from lightning_sparse.accounting.memory import peak_memory
from lightning_sparse.compat.lightning import LightningModule, Trainer

__all__ = ["highest"]


def highest(trainer: Trainer, module: LightningModule, seconds: float | None) -> tuple[float | None, int | None]:
    """Return the time of a step and the peak memory, of several processes the largest; all of them call this.

    Args:
        trainer: of the run.
        module: on the device whose memory is meant.
        seconds: the time of a step in this process; None: not known.
    """
    values = [math.nan if seconds is None else seconds, _peak(module.device)]
    if trainer.world_size > 1:
        both = torch.tensor(values, dtype=torch.float64, device=module.device)
        values = trainer.strategy.reduce(both, reduce_op="max").tolist()
    seconds, peak = values
    return None if math.isnan(seconds) else seconds, None if math.isnan(peak) else round(peak)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return peak_memory() if device.type == "cpu" else math.nan
