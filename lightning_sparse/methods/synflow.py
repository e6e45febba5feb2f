"""SynFlow: pruning neural networks without any data by iteratively conserving synaptic flow (Tanaka et al., 2020).

Algorithm 1. The paper's network is a product of weights; of biases it says nothing. Decisions: parameters and buffers,
biases and batch-norm statistics among them, take their magnitudes, as in the authors' program, but for buffers with
infinite entries (attention masks); for integer inputs the ones enter at the embeddings.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.ones import EMBEDDINGS, Way, ways
from lightning_sparse.trainer.probe import Probe, quantizes

__all__ = ["SynFlow"]


class SynFlow(BeforeTraining):
    """Synaptic Flow: prune in many rounds the weights with the least flow from an input of ones; no data are used.

    In round r of n the largest ``|W * dR/dW|`` stay, ``density^(r/n)`` of the weights; ``R`` is the sum of the outputs
    of the masked network, all its parameters replaced by their magnitudes, for one input of ones, in double precision
    and evaluation mode. The input has the shape of the module's ``example_input_array``, or else of the first tensor of
    a training batch, with one sample along the first dimension. Where ``forward`` takes neither, ``training_step`` is
    called with a batch of ones, whatever its structure.

    Example:
        >>> from lightning_sparse import SynFlow
        >>> callback = SynFlow(sparsity=0.99)

    Reference:
        "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
    """

    rounds: int = option(
        default=100,
        check=partial(checks.integer, 1, "The paper's value is 100."),
        doc="number of rounds n, 1 or more; with few, whole layers may be lost.",
    )
    biases: bool = option(
        default=True,
        doc="let the magnitudes of biases take part in the flow. They feed the layers after an empty one, so the "
        "paper's guarantee that no layer is lost holds only for False.",
    )

    needs_loss = False

    @property
    def num_rounds(self) -> int:
        """The number of rounds n."""
        return self.rounds

    def choose_masks(self, probe: Probe) -> list[Tensor]:
        """Make the network positive once, then prune round by round."""
        found = ways(probe)
        first = next(found)  # of the batch as it is
        make_positive_(probe.module.double().eval(), self.biases)
        self._way = passable(probe, chain([first], found))
        try:
            return super().choose_masks(probe)
        finally:
            del self._way

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``|W * dR/dW|``."""
        R = total_output(probe.module, self._way)
        gradients = torch.autograd.grad(R, probe.weights, materialize_grads=True)
        pairs = zip(gradients, probe.weights, strict=True)
        return [(probe.over_ranks(dR.detach()) * W.detach()).abs() for dR, W in pairs]


def passable(probe: Probe, found: Iterable[Way]) -> Way:
    """Return the first way by which ones flow through the network.

    Raises:
        MisconfigurationException: there is none, or a weight to be scored lies before the place where the ones enter.
    """
    failed = []
    for way in found:
        refuse_embeddings(probe, way)
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


def refuse_embeddings(probe: Probe, way: Way) -> None:
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
