"""What all exports share: a module's evaluation on an example, how far two results are apart, and what is refused."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.torch_private import tree_leaves
from lightning_sparse.layers.sparse import sparse_layers

__all__ = [
    "Example",
    "arguments",
    "check_dense",
    "check_equal",
    "check_module",
    "check_tolerance",
    "dense_bytes",
    "evaluating",
    "results",
    "tensor_arguments",
    "tensors",
    "unpacked",
]

#: an input of a module: a tensor, or a tuple of positional arguments
Example = Tensor | tuple[Any, ...]

#: how far results may be apart, relative to the larger of 1 and the largest output
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def arguments(example_input: Example) -> tuple[Any, ...]:
    """Return the positional arguments that ``example_input`` stands for.

    Raises:
        ValueError: it is neither a tensor nor a tuple.
    """
    if not isinstance(example_input, (Tensor, tuple)):
        raise ValueError(
            "example_input must be a tensor, or a tuple of the positional arguments of forward, got one of type "
            f"{type(example_input).__name__}. Give a batch of inputs, such as torch.randn(2, 784)."
        )
    return example_input if isinstance(example_input, tuple) else (example_input,)


def tensor_arguments(example_input: Example) -> tuple[Tensor, ...]:
    """Return the positional arguments that ``example_input`` stands for, all of them tensors.

    Raises:
        ValueError: they are not.
    """
    given = arguments(example_input)
    others = [type(x).__name__ for x in given if not isinstance(x, Tensor)]
    if others:
        raise ValueError(
            f"example_input must be a tensor, or a tuple of tensors, got a tuple with {', '.join(others)}. If forward "
            "takes more than tensors, give a module that calls it with the rest."
        )
    return given


def unpacked(outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Return the one tensor, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into eval mode without gradients; afterwards every submodule gets its own mode back."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in training.items():
            part.training = mode


def dense_bytes(module: nn.Module) -> int:
    """Return what the weights of the module's sparse layers would take if they were dense."""
    layers = sparse_layers(module).values()
    return sum(math.prod(layer.shape) * layer.values.element_size() for layer in layers)


def check_module(module: nn.Module) -> None:
    """Refuse what is no module.

    Raises:
        ValueError: it is something else.
    """
    checks.module(module=module)


def check_dense(module: nn.Module, what: str) -> None:
    """Refuse what is no module, and a module with sparse layers.

    Raises:
        ValueError: it has some; ``what`` names the function that cannot take them.
    """
    check_module(module)
    layers = [name or "the module" for name in sparse_layers(module)]
    if layers:
        raise ValueError(
            f"{what} needs dense weights, but these layers are sparse: {', '.join(layers)}. Give it "
            "lightning_sparse.storage.to_dense(copy.deepcopy(module)), whose dense weights of these layers take "
            f"{dense_bytes(module) / 2**20:,.1f} MiB; to_csr and save_sparse do not need them."
        )


def check_tolerance(tolerance: float | None) -> None:
    """Refuse what is no tolerance: with NaN nothing would be equal, with infinity everything.

    Raises:
        ValueError: it is neither a finite number from 0 nor None.
    """
    if tolerance is not None:
        checks.at_least(0, "Leave it out for one by the outputs' dtype, 1e-5 for float32.", tolerance=tolerance)


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a nested output in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def results(module: nn.Module, example_input: Example) -> list[Tensor]:
    """Return the tensors that ``module`` gives for the example in eval mode, computed without TF32 on a GPU.

    Raises:
        ValueError: the module has no ``forward``, as a LightningModule that has steps only.
    """
    with evaluating(module), _whole_float32():
        try:
            return tensors(module(*arguments(example_input)))
        except NotImplementedError as error:
            if "forward" not in str(error):
                raise
            raise ValueError(
                f"{type(module).__name__} has no forward, which an export follows. Give the network within it, such as "
                "module.net, or define forward."
            ) from error


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Switch off TF32, which a GPU's convolutions use by default: two equal modules differ by its rounding."""
    kinds: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    try:
        before = [kind.allow_tf32 for kind in kinds]
    except RuntimeError:  # torch lets nobody who has set fp32_precision read these
        yield
        return
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def check_equal(expected: list[Tensor], found: list[Tensor], tolerance: float | None, what: str) -> None:
    """Compare two results.

    Args:
        expected: tensors of the original.
        found: tensors of the export.
        tolerance: the largest difference allowed, relative to the larger of 1 and the largest output; None: by dtype,
            1e-5 for float32.
        what: names the export in the message.

    Raises:
        RuntimeError: they differ.
    """
    if [x.shape for x in expected] != [x.shape for x in found]:
        shapes = [tuple(x.shape) for x in expected], [tuple(x.shape) for x in found]
        raise RuntimeError(f"{what} gives tensors of shapes {shapes[1]} instead of {shapes[0]} on the example input.")
    for right, x in zip(expected, found, strict=True):
        allowed = _TOLERANCE.get(right.dtype, 0.0) if tolerance is None else tolerance
        right, x = right.double().cpu(), x.double().cpu()
        scale = float(right[right.isfinite()].abs().max()) if right.isfinite().any() else 0.0
        if not torch.allclose(x, right, rtol=0.0, atol=allowed * max(1.0, scale), equal_nan=True):
            raise RuntimeError(
                f"{what} differs from the module by {float((x - right).abs().max()):.1e} on the example input, where "
                f"{allowed * max(1.0, scale):.1e} is allowed. If the module is random or has a state that it changes "
                "in eval mode, it cannot be exported; if it computes in low precision, raise tolerance."
            )
