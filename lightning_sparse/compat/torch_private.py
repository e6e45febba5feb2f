"""PyTorch's private corners: each use of a name that PyTorch may change stands here, with what it relies on.

All of them are there in every PyTorch from 2.4 on, the oldest that is supported, unless it says otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # 1, 2 and 3 dimensions, synchronized or not
from torch.nn.modules.batchnorm import _NormBase as RunningNorm  # the same, and instance norms
from torch.nn.modules.conv import _ConvNd as Convolution  # all of them, transposed ones as well
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutput  # MultiheadAttention's out_proj
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNorm
from torch.nn.utils.parametrizations import _WeightNorm as WeightNorm
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook  # of torch.nn.utils.weight_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR
from torch.utils._python_dispatch import TorchDispatchMode  # documented, but not exported from a public place
from torch.utils._python_dispatch import _disable_current_modes as unseen  # a context in which such modes see nothing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "SIDES",
    "AttentionOutput",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "RunningNorm",
    "SpectralNorm",
    "TorchDispatchMode",
    "WeightNorm",
    "backward_pass",
    "calls_step_hooks",
    "children",
    "complete_momentum",
    "copy_each",
    "finite_each",
    "found_infinite",
    "gradient_scale",
    "has_forward_hooks",
    "hidden_from_ddp",
    "hide_from_ddp",
    "in_forward_mode",
    "lerp_each",
    "multiply_each",
    "operation",
    "padded_sides",
    "parameters",
    "register_before_load",
    "schedules_within",
    "set_parameters",
    "storage_identity",
    "stored_values",
    "takes_scaled_gradients",
    "tensor_without_elements",
    "trace",
    "tree_leaves",
    "tree_map",
    "unseen",
    "weight_norm_hooks",
]

#: attribute of a convolution that ``padded_sides`` reads
SIDES = "_reversed_padding_repeated_twice"
_HIDDEN = "_ddp_params_and_buffers_to_ignore"


# ---------------------------------------------------------------------- tensors and operations


def storage_identity(tensor: Tensor) -> int:
    """Return a number of the storage that a tensor views, also on the meta device, where there are no addresses.

    Relies on ``UntypedStorage._cdata``, the address of the C++ object.
    """
    number: int = tensor.untyped_storage()._cdata
    return number


def operation(overload: Any) -> Any:
    """Return the operation, such as ``torch.ops.aten.mm``, of the overload that a dispatch mode is given.

    Relies on ``OpOverload._overloadpacket``, by which ``torch.utils.flop_counter`` lists its formulas.
    """
    return overload._overloadpacket


def backward_pass() -> int:
    """Return a number of the backward pass that is running, which no other has.

    Relies on ``torch._C._current_graph_task_id``, which torch's own hooks for several gradients use.
    """
    return torch._C._current_graph_task_id()


def in_forward_mode() -> bool:
    """Tell whether operations are differentiated forward.

    Relies on ``torch.autograd.forward_ad._current_level``: -1 outside.
    """
    return torch.autograd.forward_ad._current_level >= 0


def trace(tensor: Tensor) -> tuple[int, int]:
    """Return what differs once other code has written into a tensor in place, or given it another storage.

    Relies on ``Tensor._version``, which each operation in place counts up. Writes through ``.data`` and in inference
    mode leave no trace there. A DTensor and its part, ``DTensor._local_tensor``, count each by itself.
    """
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return tensor._version + part._version, part.data_ptr()


def stored_values(tensor: Tensor) -> Tensor:
    """Return what a tensor stores: of a sparse one its values, also where several stand for one element.

    Relies on ``Tensor._values``; the public ``values`` first adds them up.
    """
    return tensor._values() if tensor.is_sparse else tensor


def tensor_without_elements(kind: type[Tensor], shape: Sequence[int], like: Tensor) -> Any:
    """Return a tensor of a subclass that has a shape, and the dtype and device of ``like``, but stores nothing.

    Relies on ``Tensor._make_wrapper_subclass``. ``isinstance(x, nn.Parameter)`` relies on an attribute ``_is_param``.
    """
    return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        kind, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
    )


def copy_each(into: list[Tensor], values: list[Tensor]) -> None:
    """Write each of ``values`` into its partner, on a GPU by few launches in all.

    Relies on ``torch._foreach_copy_``, which torch's own optimizers use, as the next two do on its likes.
    """
    torch._foreach_copy_(into, values)


def multiply_each(x: list[Tensor], factors: list[Tensor]) -> None:
    """Multiply each of ``x``, in place, by its partner of the same dtype."""
    torch._foreach_mul_(x, factors)


def lerp_each(x: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move each of ``x``, in place, by the share ``weight`` towards its partner of the same dtype."""
    torch._foreach_lerp_(x, ends, weight)


def finite_each(tensors: list[Tensor]) -> bool:
    """Tell whether all tensors, of one device and real dtype, are finite: by one launch or two in all.

    Relies on ``torch._amp_foreach_non_finite_check_and_unscale_``, which ``GradScaler`` uses; the scale is 1.
    """
    found, one = _flags(tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    if not found.item():
        return True
    found.zero_()
    return False


@cache
def _flags(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a 0, and a 1."""
    return torch.zeros(1, device=device), torch.ones(1, device=device)


# ---------------------------------------------------------------------- modules


def parameters(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of a layer itself, also those that are None.

    Relies on ``nn.Module._parameters``.
    """
    return layer._parameters


def set_parameters(layer: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Exchange all parameters of a layer itself; relies on ``nn.Module._parameters``."""
    layer._parameters = dict(parameters)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the children of a module under all their names; writing there exchanges them.

    Relies on ``nn.Module._modules``; ``named_children`` has each module once.
    """
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether hooks listen to a module's calls.

    Relies on ``nn.Module._forward_hooks`` and ``_forward_pre_hooks``.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def padded_sides(conv: Any) -> Sequence[int]:
    """Return what a convolution hands to ``pad`` itself: left, right, top, bottom.

    Relies on ``_ConvNd._reversed_padding_repeated_twice``, which ``padding="same"`` is resolved in.
    """
    sides: Sequence[int] = getattr(conv, SIDES)
    return sides


def register_before_load(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Call ``hook`` before ``module`` takes up its part of a state; return what takes it away.

    Relies on ``nn.Module._register_load_state_dict_pre_hook``. The public ``register_load_state_dict_pre_hook`` of
    later versions hands the module to the hook as well.
    """
    return module._register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- DDP and AMP


def hidden_from_ddp(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that DDP will leave alone.

    Relies on ``_ddp_params_and_buffers_to_ignore``, an attribute that DDP reads off the module it wraps.
    """
    return list(getattr(module, _HIDDEN, ()))


def hide_from_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Have DDP leave just these parameters and buffers alone; see ``hidden_from_ddp``."""
    setattr(module, _HIDDEN, list(names))


def takes_scaled_gradients(optimizer: Optimizer | None) -> bool:
    """Tell whether an optimizer is fused: a gradient scaler leaves it to divide the gradients itself.

    Relies on ``_step_supports_amp_scaling``, which ``GradScaler`` reads off the optimizer.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def found_infinite(optimizer: Optimizer) -> Tensor | None:
    """Return what tells a fused optimizer in its step that gradients are infinite, and it makes no update.

    Relies on ``found_inf``, which ``GradScaler`` sets on the optimizer during the step; None: there is no scaler.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found


# ---------------------------------------------------------------------- learning rates


def schedules_within(scheduler: Any) -> list[tuple[int, Any]]:
    """Return the schedulers that a composed one is made of, each with the move at which its turn begins.

    Relies on ``SequentialLR._schedulers`` and ``_milestones``, and on ``ChainedScheduler._schedulers``. Of any other
    scheduler it is the scheduler itself.
    """
    if isinstance(scheduler, SequentialLR):
        return list(zip([0, *scheduler._milestones], scheduler._schedulers, strict=True))
    if isinstance(scheduler, ChainedScheduler):
        return [(0, part) for part in scheduler._schedulers]
    return [(0, scheduler)]


def calls_step_hooks(optimizer: Any) -> bool:
    """Tell whether hooks that are registered on an optimizer will be called in its step.

    Relies on ``Optimizer.__init__`` giving each instance ``_optimizer_step_pre_hooks``, and on
    ``Optimizer.profile_hook_step`` marking a step that calls them with ``hooked``, also below a scheduler's wrapper.
    """
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and bool(getattr(optimizer.step, "hooked", False))


def gradient_scale(optimizer: Optimizer) -> Tensor | float:
    """Return the factor that the gradients of a fused optimizer still carry in its step, 1 if there is none.

    Relies on ``grad_scale``, which ``GradScaler`` sets on the optimizer during the step.
    """
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def complete_momentum(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters that step for the first time a momentum of 0, if those beside them in fused SGD have one.

    Relies on fused SGD taking either no momentum of a group for the first one, or all of them.
    """
    groups = [group for group in optimizer.param_groups if group.get("fused") and group.get("momentum")]
    stepping = {id(p): p for p in parameters if p.grad is not None} if groups else {}
    for group in groups:
        held = [p for p in group["params"] if optimizer.state.get(p, {}).get("momentum_buffer") is not None]
        if held and "dampening" in group:
            known = {id(p) for p in held}
            for p in group["params"]:
                if id(p) in stepping and id(p) not in known:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def weight_norm_hooks(module: nn.Module) -> list[WeightNormHook]:
    """Return what ``torch.nn.utils.weight_norm`` has put on a module: a ``name`` and a ``dim`` each."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNormHook)]
