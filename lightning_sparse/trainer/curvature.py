"""Second derivatives of the loss before training, and the logits that it is computed from (GraSP)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.trainer.probe import Probe, quantizes

__all__ = ["differentiable_twice", "dividing_logits", "hessian_product"]

_WITHOUT = "Use SNIP or SynFlow, or write the operation with ones that have them."


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
                + ("Under quantization-aware training, use SNIP." if quantizes(probe.module) else _WITHOUT)
            ) from error
        for total, W in zip(sums, probe.weights, strict=True):
            if W.grad is not None:
                total += W.grad
    return [probe.over_ranks(total / count) for total in sums]


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Take the forms of attention and of recurrent layers that have second derivatives."""
    fast_rnn = torch.backends.cudnn.flags(enabled=False) if torch.cuda.is_available() else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), fast_rnn:
        yield


@contextmanager
def dividing_logits(module: nn.Module, name: str | None, temperature: float) -> Iterator[None]:
    """Divide logits by a temperature meanwhile, and make sure that it was done.

    Args:
        module: whose training step is called meanwhile.
        name: of the submodule that returns the logits; None: the module's own ``forward``.
        temperature: 1 leaves them as they are.
    """
    if temperature == 1:
        yield
        return
    where = f"the submodule {name!r}" if name else "the module's forward, as self(x)"
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
        return output / temperature

    submodules = dict(module.named_modules())
    if (name or "") not in submodules:
        raise MisconfigurationException(
            f"logits={name!r} names no submodule of {type(module).__name__}. There are: "
            f"{[name for name in submodules if name]}."
        )
    with submodules[name or ""].register_forward_hook(divide):
        yield
    if not calls:
        raise MisconfigurationException(
            f"GraSP divides logits by its temperature, but training_step never calls {where}. {remedy}"
        )
