"""Averages of weights over time, which other callbacks keep, are as sparse as the network whenever they are used.

Before an average is validated or saved, and at the end, it is set to 0 where the present masks are. This is done in the
average itself, so a run that is resumed goes on with the same one.
"""

import torch
from torch import nn

from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.lightning_private import averaged_module
from lightning_sparse.rules import select
from lightning_sparse.trainer.guards import averaging
from lightning_sparse.trainer.readouts import Readouts
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["mask_averages", "take_writes_between"]


@torch.no_grad()
def mask_averages(method: Readouts, trainer: Trainer, *others: LightningModule) -> None:
    """Set averages of the method's weights to 0 outside of the masks.

    Args:
        method: whose fit this is; outside of one nothing is done.
        trainer: whose callbacks keep the averages.
        others: modules that may have been given an average just now.
    """
    if method._fit.trainer is None:
        return
    averages: list[nn.Module | None] = [averaged_module(callback) for callback in averaging(trainer)]
    if not averages:
        return
    parameters = [dict(module.named_parameters()) for module in (*averages, *others) if module is not None]
    for name in method._weights:
        mask = method.mask(name)
        for weights in parameters:
            if name in weights:
                select.zero_outside_(weights[name].data, mask.to(weights[name].device))


def take_writes_between(method: Verbs) -> None:
    """Go on with what other code has written between updates, unless it may be an average that someone keeps."""
    trainer = method._fit.trainer
    if trainer is not None and not averaging(trainer):
        method.take_writes(by_value=True)
