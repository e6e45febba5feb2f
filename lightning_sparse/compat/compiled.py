"""Compiled modules (``torch.compile``): when their code must run uncompiled, and how they are copied.

Code that has been compiled does not hear hooks that come later, and has no second derivatives.
"""

import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Uncompiled", "can_pause", "copied", "is_compiled", "original", "plain_name"]

_INNER = "_orig_mod"  # attribute of what torch.compile returns: the module that it was given
# what a compiled LightningModule has as attributes, bound to itself
_BOUND = ("forward", "training_step", "validation_step", "test_step", "predict_step")

T = TypeVar("T")


class Uncompiled:
    """Until this is closed, compiled code runs uncompiled, all over the process; before PyTorch 2.6 it does not.

    Several may overlap in any order: the compiler's stance that the first one found comes back with the last.
    """

    _open: ClassVar[set["Uncompiled"]] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        if can_pause() and not Uncompiled._open:
            Uncompiled._stance = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]
        Uncompiled._open.add(self)

    def close(self) -> None:
        """Let compiled code run again, unless another is open."""
        if self in Uncompiled._open:
            Uncompiled._open.remove(self)
            if can_pause() and not Uncompiled._open:
                Uncompiled._stance.__exit__(None, None, None)


def can_pause() -> bool:
    """Tell whether this PyTorch can run compiled code uncompiled."""
    return hasattr(torch.compiler, "set_stance")


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module`` or a part of it is compiled; functions that it calls may still be."""
    from torch._dynamo import OptimizedModule  # takes a second to import

    return any(
        isinstance(part, OptimizedModule)
        or vars(part).get("_compiled_call_impl") is not None
        or vars(part).get("_compiler_ctx") is not None
        for part in module.modules()
    )


def original(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, or ``module`` itself."""
    inner: nn.Module = getattr(module, _INNER, module)
    return inner


def plain_name(name: str) -> str:
    """Return the name that a parameter would have if no module around it were compiled."""
    return name.replace(f"{_INNER}.", "")


def copied(thing: T, root: nn.Module) -> T:
    """Return a deep copy of ``thing``, in which LightningModules among ``root`` and its parts are not compiled.

    Else the copy's ``forward`` would be the original's. Attributes of modules that are results of computations, as
    weight_norm keeps, have their values in the copy without what they were computed from.
    """
    compiled: list[Any] = [part for part in root.modules() if vars(part).get("_compiler_ctx") is not None]
    memo: dict[int, Any] = {id(part._compiler_ctx): {} for part in compiled}
    for part in root.modules():
        for held in vars(part).values():
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    own = copy.deepcopy(thing, memo)
    for part in compiled:
        twin = memo[id(part)]
        twin._compiler_ctx = None
        for name in _BOUND:
            vars(twin).pop(name, None)
    return own
