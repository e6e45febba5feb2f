"""SynFlow: pruning neural networks without any data by iteratively conserving synaptic flow (Tanaka et al., 2020).

Algorithm 1. The paper's network is a product of weights; of biases it says nothing. Decisions: parameters and buffers,
biases and batch-norm statistics among them, take their magnitudes, as in the authors' program, but for buffers with
infinite entries (attention masks); for integer inputs the ones enter at the embeddings.
"""

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.flow import make_positive_, passable, total_output
from lightning_sparse.trainer.ones import ways
from lightning_sparse.trainer.probe import Probe

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
