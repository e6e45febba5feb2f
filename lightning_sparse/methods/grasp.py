"""GraSP: picking winning tickets before training by preserving gradient flow (Wang et al., ICLR 2020).

Algorithm 1. Removing a weight changes the gradient flow ``g'g`` by about ``2 S``, ``S = -W * Hg``, so a large
``S`` marks a weight whose removal helps: the smallest stay, as in Algorithm 1 and the authors' program. ``absolute``
is the variant of Lubana and Dick (ICLR 2021): what changes the flow least, in either direction, goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.probe import Probe, whole

__all__ = ["GraSP"]


class GraSP(BeforeTraining):
    """Gradient Signal Preservation: keep the connections whose removal would reduce the gradient's norm most.

    ``S = -W * Hg`` with the gradient ``g`` and the Hessian ``H`` of the mean loss of some batches, its logits divided
    by ``temperature``; the smallest ``S`` of the whole network stay.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import GraSP
        >>> callback = GraSP(sparsity=0.95, batches=10)

    Reference:
        "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
    """

    batches: int = option(
        default=1,
        check=partial(checks.integer, 1, "About ten samples of each class are usual."),
        doc="number of training batches (of each process) whose loss is differentiated, 1 or more.",
    )
    absolute: bool = option(default=False, doc="keep the largest ``|S|`` instead.")
    temperature: float = option(
        default=200.0,
        check=partial(checks.above, 0, "The paper's value is 200; 1 leaves the logits as they are."),
        doc="the logits are divided by it, above 0; 1 leaves them as they are.",
    )
    logits: str | None = option(
        default=None,
        doc='name of the submodule that returns the logits, such as ``"net.head"``; default: the module\'s own '
        "``forward``, which ``training_step`` then has to call as ``self(x)``.",
    )

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``-S = W * Hg``, or its magnitude."""
        with _differentiable_twice(), self._tempered(probe.module):
            Hg = hessian_product(probe, self.batches, probe.gradient(self.batches))
        kept = [whole(W) * product for W, product in zip(probe.weights, Hg, strict=True)]
        return [score.abs() for score in kept] if self.absolute else kept

    @contextmanager
    def _tempered(self, module: nn.Module) -> Iterator[None]:
        """Divide logits by the temperature, and make sure that it was done."""
        if self.temperature == 1:
            yield
            return
        where = f"the submodule {self.logits!r}" if self.logits else "the module's forward, as self(x)"
        remedy = "Name the submodule that returns the logits, as in logits='net.head', or set temperature=1."
        calls = 0

        def divide(_: nn.Module, inputs: Any, output: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if not isinstance(output, Tensor):
                raise MisconfigurationException(
                    f"GraSP divides logits by its temperature, but those of {where}, are of type "
                    f"{type(output).__name__}, no tensor. {remedy}"
                )
            return output / self.temperature

        submodules = dict(module.named_modules())
        if (self.logits or "") not in submodules:
            raise MisconfigurationException(
                f"logits={self.logits!r} names no submodule of {type(module).__name__}. There are: "
                f"{[name for name in submodules if name]}."
            )
        with submodules[self.logits or ""].register_forward_hook(divide):
            yield
        if not calls:
            raise MisconfigurationException(
                f"GraSP divides logits by its temperature, but training_step never calls {where}. {remedy}"
            )


def hessian_product(probe: Probe, count: int, vectors: list[Tensor]) -> list[Tensor]:
    """Return the product of the Hessian of the mean loss of ``count`` batches (of each process) with ``vectors``."""
    sums = [torch.zeros_like(vector) for vector in vectors]
    for loss in probe.losses(count):
        gradients = torch.autograd.grad(loss, probe.weights, create_graph=True, materialize_grads=True)
        flow = sum((dP * vector).sum() for dP, vector in zip(gradients, vectors, strict=True))
        if not isinstance(flow, Tensor) or not flow.requires_grad:  # a loss that is linear in the weights
            continue
        probe.module.zero_grad()
        try:  # grad() would pass over a function that is marked as differentiable once
            flow.backward()  # type: ignore[no-untyped-call]  # Call to untyped function "backward" in typed context
        except RuntimeError as error:
            raise MisconfigurationException(
                f"GraSP needs second derivatives, which an operation of the module does not have: {error}. "
                "Use SNIP or SynFlow, or write the operation with ones that have them."
            ) from error
        for total, W in zip(sums, probe.weights, strict=True):
            if W.grad is not None:
                total += W.grad
    return [probe.over_ranks(total / count) for total in sums]


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Take the forms of attention and of recurrent layers that have second derivatives."""
    fast_rnn = torch.backends.cudnn.flags(enabled=False) if torch.cuda.is_available() else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), fast_rnn:
        yield
