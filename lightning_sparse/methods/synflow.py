"""SynFlow: pruning neural networks without any data by iteratively conserving synaptic flow (Tanaka et al., 2020).

Algorithm 1. The paper's network is a product of weights; of biases it says nothing. Decisions: parameters and buffers,
biases and batch-norm statistics among them, take their magnitudes, as in the authors' program, but for buffers with
infinite entries (attention masks); for integer inputs the ones enter at the embeddings.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.probe import Probe

__all__ = ["SynFlow"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class SynFlow(BeforeTraining):
    """Synaptic Flow: prune in many rounds what carries least of an all-ones input through ``|W|``; no data are used.

    In round r of n the largest ``|W * dR/dW|`` stay, ``density^(r/n)`` of the weights; ``R`` is the sum of the outputs
    of the masked network, all its parameters replaced by their magnitudes, for one input of ones, in double precision
    and evaluation mode. The input has the shape of the module's ``example_input_array``, or else of the first tensor of
    a training batch, with one sample along the first dimension.

    Example:
        >>> from lightning_sparse import SynFlow
        >>> callback = SynFlow(sparsity=0.99)

    Reference:
        "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
    """

    rounds: int = option(
        default=100,
        check=partial(checks.integer, 1, "The paper's value is 100."),
        doc="number of rounds n, 1 or more; with few, layers may be lost as a whole.",
    )
    biases: bool = option(
        default=True,
        doc="let biases, by magnitude, take part in the flow. They carry some past layers that have lost all, so the "
        "paper's guarantee that no layer is lost holds for False alone.",
    )

    needs_loss = False

    @property
    def num_rounds(self) -> int:
        """The number of rounds n."""
        return self.rounds

    def choose_masks(self, probe: Probe) -> list[Tensor]:
        """Make the network positive once, then prune round by round."""
        self._inputs = ones_like_inputs(probe)
        refuse_embeddings(probe, self._inputs)
        make_positive_(probe.module.double().eval(), self.biases)
        try:
            return super().choose_masks(probe)
        finally:
            del self._inputs

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``|W * dR/dW|``."""
        R = total_output(probe.module, *self._inputs)
        gradients = torch.autograd.grad(R, probe.weights, materialize_grads=True)
        return [(probe.over_ranks(dR) * W.detach()).abs() for dR, W in zip(gradients, probe.weights, strict=True)]


def refuse_embeddings(probe: Probe, inputs: tuple[list[Any], dict[str, Any]]) -> None:
    """Raise if a weight to be scored lies before the place where the ones enter."""
    if all(x.is_floating_point() for x in tensors(inputs)):
        return
    tables = {id(part.weight) for part in probe.module.modules() if isinstance(part, _EMBEDDINGS)}
    chosen = [name for name, W in zip(probe.names, probe.weights, strict=True) if id(W) in tables]
    if chosen or not tables:
        raise MisconfigurationException(
            "The inputs are integers, for which SynFlow's ones enter after the embeddings: "
            + (f"it cannot score {chosen}. Leave them dense with exclude." if chosen else "there are none.")
        )


def make_positive_(module: nn.Module, biases: bool) -> None:
    """Replace all parameters and buffers by their magnitudes, or biases by 0."""
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if not biases and "bias" in name.rpartition(".")[2]:
            x.data.zero_()
        elif x.is_floating_point() and x.isfinite().all():
            x.data.abs_()


def total_output(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the sum of all that ``forward`` returns; for integer inputs the ones enter after the embeddings."""
    tokens = [x for x in tensors((list(args), dict(kwargs))) if not x.is_floating_point()]
    with ExitStack() as stack:
        for part in module.modules():
            if tokens and isinstance(part, _EMBEDDINGS):
                stack.enter_context(part.register_forward_hook(_ones))
        try:
            outputs = module(*args, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            shapes = [tuple(x.shape) for x in tensors((list(args), dict(kwargs)))]
            raise MisconfigurationException(
                f"SynFlow could not call {type(module).__name__}.forward with inputs of shapes {shapes} in double "
                f"precision: {error}. Define forward, and set example_input_array to what it takes."
            ) from error
    R = sum((x.sum() for x in tensors(outputs) if x.is_floating_point()), torch.zeros(()))
    if not R.requires_grad:
        raise MisconfigurationException(
            f"SynFlow found no output of forward that depends on the weights: it returned {type(outputs).__name__}. "
            "Return tensors, a list, a tuple or a dict."
        )
    return R


def ones_like_inputs(probe: Probe) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and keyword arguments of ``forward``, filled with ones; integers become zeros."""
    given: Any = probe.module.example_input_array
    if given is None:
        given = next(tensors(next(probe.batches(1))), None)
        if given is None:
            raise MisconfigurationException(
                "SynFlow found no tensor in the training batch. Set the module's example_input_array to an input."
            )
    args = list(given) if isinstance(given, (tuple, list)) else [] if isinstance(given, Mapping) else [given]
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    device = probe.trainer.strategy.root_device
    return [_filled(x, device) for x in args], {name: _filled(x, device) for name, x in kwargs.items()}


def _filled(x: Any, device: torch.device) -> Any:
    if not isinstance(x, Tensor):
        return x
    shape = (1, *x.shape[1:])
    if x.is_floating_point():
        return torch.ones(shape, dtype=torch.float64, device=device)
    return torch.zeros(shape, dtype=x.dtype, device=device)


def _ones(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.ones_like(output)
