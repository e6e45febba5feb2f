"""The flow of ones through the copy of a network whose parameters are magnitudes (Tanaka et al., 2020)."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.nested import tensors
from lightning_sparse.trainer.ones import EMBEDDINGS, Way
from lightning_sparse.trainer.probe import Probe, quantizes

__all__ = ["make_positive_", "passable", "total_output"]


def passable(probe: Probe, found: Iterable[Way]) -> Way:
    """Return the first way by which ones flow through the network.

    Raises:
        MisconfigurationException: there is none, or a weight to be scored lies before the place where the ones enter.
    """
    failed = []
    for way in found:
        _refuse_embeddings(probe, way)
        try:
            total_output(probe.module, way)
        except Exception as error:  # of foreign code
            failed.append(f"SynFlow could not call {way.name} in double precision: {error}.")
        else:
            return way
    remedy = "Define forward, and set example_input_array to what it takes, or use SNIP or RandomPruning."
    if quantizes(probe.module):
        remedy = (
            "Under quantization-aware training, use SNIP. Or prune before: train with SynFlow, prepare the module for "
            "quantization, and train it with FixedMask(sparsity=None, initial='zeros')."
        )
    raise MisconfigurationException(" ".join([*failed, remedy]))


def _refuse_embeddings(probe: Probe, way: Way) -> None:
    """Raise if a weight to be scored lies before the place where the ones enter."""
    tables = {id(part.weight) for part in probe.module.modules() if isinstance(part, EMBEDDINGS)}
    chosen = [name for name, W in zip(probe.names, probe.weights, strict=True) if id(W) in tables]
    if chosen and way.has_tokens:
        raise MisconfigurationException(
            "The inputs are integers, for which SynFlow's ones enter after the embeddings: "
            f"it cannot score {chosen}. Leave them dense with exclude."
        )


def make_positive_(module: nn.Module, biases: bool) -> None:
    """Replace all parameters and buffers by their magnitudes, or biases by 0."""
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if not biases and "bias" in name.rpartition(".")[2]:
            x.data.zero_()
        elif x.is_floating_point() and x.isfinite().all():
            x.data.abs_()


def total_output(module: nn.Module, way: Way) -> Tensor:
    """Return the sum of all that ``module`` returns; for integer inputs the ones enter after the embeddings."""
    embeddings = [part for part in module.modules() if isinstance(part, EMBEDDINGS)]
    if not way.has_ones and not embeddings:
        raise TypeError("the inputs are integers, for which SynFlow's ones enter after the embeddings: there are none")
    with ExitStack() as stack:
        for part in embeddings if way.has_tokens else ():
            stack.enter_context(part.register_forward_hook(_ones))
        outputs = way.call()
    R = sum((x.sum() for x in tensors(outputs) if x.is_floating_point()), torch.zeros(()))
    if not R.requires_grad:
        raise TypeError(
            f"SynFlow found no output of forward that depends on the weights: it returned {type(outputs).__name__}, "
            "not tensors, a list, a tuple or a dict of some"
        )
    return R


def _ones(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.ones_like(output)
