"""What becomes of a weight before its layer computes with it.

Zeros of a parameter save nothing where its layer centres it, mixes it or adds to it first; and where rows are divided
by their norms, one without weights is 0 / 0. Parametrizations of torch are known; others, and layers with a forward of
their own, are tried: with zeros in the parameter, are they in what the layer computes with?
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from lightning_sparse.compat.torch_private import (
    AttentionOutput,
    Convolution,
    SpectralNorm,
    WeightNorm,
    weight_norm_hooks,
)
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.rules.matrices import Outputs

__all__ = ["Transform", "is_factor", "is_gain", "of_layer", "of_parametrization"]

#: in the package timm, which standardises the weight: zero mean in each output
_STANDARDISED = frozenset({"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"})

_PRODUCTS = frozenset(
    {
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    }
)


class Transform(NamedTuple):
    """What is done to a weight before it is used.

    Attributes:
        reason: why its zeros are of no use; None: they are zeros of what is used, too.
        nonempty: where rows lie that are divided by their norms, so that none may be empty; None: any may be.
    """

    reason: str | None = None
    nonempty: Outputs | None = None


def is_gain(layer: nn.Module, local: str) -> bool:
    """Tell whether a parameter is what ``torch.nn.utils.weight_norm`` multiplies a direction by."""
    return any(local == f"{hook.name}_g" for hook in weight_norm_hooks(layer))


def is_factor(parametrized: ParametrizationList, local: str) -> bool:
    """Tell whether a parametrization makes its weight of this parameter and others: a gain, or a factor."""
    if len(parametrized) and isinstance(parametrized[0], WeightNorm):
        return local == "original0"
    names = [name for name, _ in parametrized.named_parameters(recurse=False)]
    return len(names) > 1


def of_layer(layer: nn.Module, local: str) -> Transform | None:
    """Return what a layer does to its parameter ``local`` before it computes with it; None: nothing that is known."""
    for hook in weight_norm_hooks(layer):
        if local == f"{hook.name}_v":
            return Transform(nonempty=Outputs(hook.dim) if hook.dim >= 0 else None)
    for kind in type(layer).__mro__:
        if kind.__module__.partition(".")[0] == "timm" and kind.__name__ in _STANDARDISED:
            return Transform(_lost(kind.__name__))
    if local != "weight" or not _has_own_forward(layer):
        return None
    assert isinstance(layer.weight, Tensor)
    return _tried(lambda W: _computed_with(layer, W), layer.weight, type(layer).__name__)


def of_parametrization(parametrized: ParametrizationList, local: str) -> Transform | None:
    """Return what a parametrization does to its parameter ``local``, as ``of_layer``."""
    names = ", ".join(type(step).__name__ for step in parametrized)
    parameter = getattr(parametrized, local)
    if len(parametrized) == 1:
        step: Any = parametrized[0]
        if isinstance(step, WeightNorm):
            return Transform(nonempty=Outputs(step.dim) if step.dim >= 0 else None)
        if isinstance(step, SpectralNorm):
            return Transform()
    return _tried(lambda W: _parametrized(parametrized, local, W), parameter, names)


# ---------------------------------------------------------------------- by trial


def _tried(used: Callable[[Tensor], Tensor | None], parameter: Tensor, name: str) -> Transform | None:
    """Return what is done to a weight by ``name``; ``used`` returns what becomes of given values, None: unknown."""
    if parameter.is_meta or not parameter.is_floating_point() or parameter.ndim < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    values, drawn = (torch.randn(parameter.shape, generator=generator).to(parameter) for _ in range(2))
    scattered = values * (drawn > 0)
    try:
        with torch.no_grad(), torch.random.fork_rng([values.device] if values.is_cuda else []):
            whole, found = used(values), used(scattered)
            if whole is None or found is None or not whole.isfinite().all():
                return None
            if whole.shape != values.shape or not ((found == 0) | ~found.isfinite())[scattered == 0].all():
                return Transform(_lost(name))
            divided = [axis for axis in range(values.ndim) if not _survives(used, values, axis)]
    except Exception:  # code that cannot be tried
        return None
    if len(divided) > 1:
        return Transform(f"{name} divides it by norms along several dimensions")
    return Transform(nonempty=Outputs(divided[0]) if divided else None)


def _survives(used: Callable[[Tensor], Tensor | None], values: Tensor, axis: int) -> bool:
    """Tell whether what is used stays finite if the first row along ``axis`` is empty."""
    emptied = values.clone()
    emptied.select(axis, 0).zero_()
    found = used(emptied)
    return found is None or bool(found.isfinite().all())


def _lost(name: str) -> str:
    return f"{name} changes it before use: its zeros are no zeros of what is used"


def _parametrized(parametrized: ParametrizationList, local: str, values: Tensor) -> Tensor:
    """Return what a copy of a parametrization makes of ``values``."""
    twin: Any = deepcopy(parametrized).eval()
    setattr(twin, local, nn.Parameter(values))
    made: Tensor = twin()
    return made


def _has_own_forward(layer: nn.Module) -> bool:
    """Tell whether a linear layer or convolution computes by code that is neither torch's nor this package's."""
    if not isinstance(layer, (nn.Linear, Convolution)) or isinstance(layer, (AttentionOutput, SparseLayer)):
        return False
    functions = (getattr(type(layer), name, None) for name in ("forward", "_conv_forward"))
    return any(not getattr(function, "__module__", "torch.").startswith("torch.") for function in functions if function)


class _Products(TorchFunctionMode):
    """Notes the weights that linear maps and convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _PRODUCTS:
            self.weights.append(args[1] if len(args) > 1 else given["weight"])
        return func(*args, **given)


def _computed_with(layer: nn.Module, values: Tensor) -> Tensor | None:
    """Return the weight that ``layer`` computes with if its parameter holds ``values``; the layer stays as it is."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}
    parameters = {**layer._parameters, "weight": nn.Parameter(values, requires_grad=False)}
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, training=False)
    if isinstance(layer, Convolution):
        spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        x = values.new_ones(1, layer.in_channels, *spans)
    else:
        x = values.new_ones(1, values.shape[1])
    with _Products() as products:
        type(layer).forward(twin, x)
    return next((weight for weight in products.weights if weight.shape == values.shape), None)
