"""How Triton's kernels of this room are compiled, for a GPU, or interpreted, on a CPU, which is slow: for tests."""

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from lightning_sparse.compat.torch_private import unseen

__all__ = ["INTERPRETED", "kernel", "launch"]

#: kernels run on a CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2):
    raise ImportError(f"Triton's interpreter crashes in these kernels before Triton 3.2, got {triton.__version__}.")


def kernel(function: Any) -> Any:
    """Return what runs a function of Triton, or one that Triton has: compiled or interpreted."""
    if not INTERPRETED:
        return function if isinstance(function, triton.JITFunction) else triton.jit(function)
    return InterpretedFunction(getattr(function, "fn", function))


def launch(function: Any, programs: int | tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Start a kernel: the one place where it is done, for launches to be counted."""
    with unseen() if INTERPRETED else nullcontext():
        function[programs if isinstance(programs, tuple) else (programs,)](*arguments, **constants)
