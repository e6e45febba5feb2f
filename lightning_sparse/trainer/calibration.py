"""Calibration: what layers read in some batches of the training data, of a copy of a network in evaluation mode."""

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.layers.input_norms import InputSquares
from lightning_sparse.layers.unit_activity import readable
from lightning_sparse.trainer.guards import listed
from lightning_sparse.trainer.probe import Probe
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["FEW_BATCHES", "few_batches", "input_norms", "times_input_norms"]

#: number of batches by default
FEW_BATCHES = 4


def few_batches(probe: Probe, asked: int | None) -> int:
    """Return the number of batches: as asked for, or a few."""
    few = min(FEW_BATCHES, probe.trainer.num_training_batches)
    return int(few) if asked is None else asked


def input_norms(method: Verbs, probe: Probe, batches: int) -> dict[str, Tensor]:
    """Return root mean squares of the inputs by name, ``(groups, in / groups * kernel)``, as far as they are seen.

    They are the same on all processes. Of weights whose inputs are not seen, it is warned.

    Args:
        method: whose scores they are for.
        probe: the network, which is put into evaluation mode.
        batches: how many of each process.

    Raises:
        MisconfigurationException: ``training_step`` fails in evaluation mode.
    """
    with closing(InputSquares(readable(probe.module, probe.names))) as seen, torch.no_grad():
        probe.module.eval()
        for index, batch in enumerate(probe.batches(batches)):
            _run(method, probe, batch, index)
    rows = {name: probe.over_ranks(number) for name, number in seen.rows.items()}
    norms = {name: (probe.over_ranks(seen.sums[name]) / rows[name]).sqrt() for name in rows if rows[name]}
    unseen = [name for name in probe.names if name not in norms]
    if unseen:
        method.warn_once(
            f"{method!r} scores some weights by |W| alone: criterion='wanda' needs a linear layer or a convolution "
            "that training_step calls as a module, and whose weight no other layer shares. That is not so for "
            f"{listed(unseen)}. Leave them dense with exclude, if you do not want that."
        )
    return norms


def times_input_norms(W: Tensor, norms: Tensor) -> Tensor:
    """Multiply each ``W_ij`` by the norm of input j, those of the group that output i belongs to."""
    return W * norms.repeat_interleave(len(W) // len(norms), 0).view(W.shape)


def _run(method: Verbs, probe: Probe, batch: Any, index: int) -> None:
    """Run the network on a batch."""
    try:
        probe.output(batch, index)
    except MisconfigurationException:
        raise
    except Exception as error:  # of foreign code
        raise MisconfigurationException(
            f"{method!r} calls training_step of a copy of {type(probe.module).__name__}, in evaluation mode and "
            f"without gradients, which failed for batch {index} with {type(error).__name__}: {error}. Make "
            "training_step run so, or use criterion='magnitude', which looks at no data."
        ) from error
