"""Products with a 2:4 matrix, by torch's operators for the sparse tensor cores of NVIDIA GPUs, and where they pay.

Torch compresses the matrix first: two of every four neighbours of a row, and where they were. A product then takes half
of its time at best. Only large products win back the time that it takes to compress.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CAPABILITY", "DTYPES", "PAYS", "capability", "linear", "size_fits", "why_dense"]

#: compute capability of the first GPUs with sparse tensor cores
CAPABILITY = 8, 0

#: what torch's kernels take of those that training uses
DTYPES = (torch.float16, torch.bfloat16)

#: smallest side of a weight: published gains are those of ViT-L's MLP, 1024 x 4096, and none of smaller ones
PAYS = 1024


def size_fits(shape: tuple[int, ...]) -> bool:
    """Tell whether torch's kernels take a matrix ``(out, in)`` of this shape."""
    return shape[0] % 32 == 0 and shape[1] % 64 == 0


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU; None: it is another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


def why_dense(
    shape: tuple[int, ...], dtype: torch.dtype, capability: tuple[int, int] | None, both: bool = False
) -> str | None:
    """Return why training multiplies by a 2:4 weight as by a dense one; None: there is an operator, and it may pay.

    Args:
        shape: of the weight, ``(out, in)``.
        dtype: of the product.
        capability: see ``capability``.
        both: its transpose is 2:4, too, and is multiplied with.

    >>> why_dense((4096, 1024), torch.bfloat16, (9, 0), both=True)
    >>> why_dense((4096, 1024), torch.float32, (9, 0))
    'computed in float32: give precision="bf16-mixed"'
    """
    if capability is None:
        return "not on an NVIDIA GPU"
    if capability < CAPABILITY:
        return f"on a GPU of compute capability {capability[0]}.{capability[1]}, below 8.0"
    if dtype not in DTYPES:
        return f'computed in {str(dtype).removeprefix("torch.")}: give precision="bf16-mixed"'
    if not size_fits(shape) or (both and not size_fits(shape[::-1])):
        return f"outputs are no multiple of {64 if both else 32}, or inputs none of 64"
    return f"too small to gain: a side is below {PAYS}" if min(shape) < PAYS else None


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W.T + bias`` for a 2:4 matrix, on a GPU; what a group of four has more than two nonzeros is lost.

    Args:
        x: ``(n, in)``, contiguous.
        W: ``(out, in)``, contiguous, of a shape for which ``size_fits``.
        bias: ``(out,)`` or None; all of one of ``DTYPES``.
    """
    return functional.linear(x, torch.sparse.to_sparse_semi_structured(W), bias)  # type: ignore[operator,union-attr]
