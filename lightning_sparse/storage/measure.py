"""How long a sparse layer takes beside a dense one: a short measurement on this machine."""

import math
import time

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.storage.layers import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["time_over_dense"]

_FEATURES, _CHANNELS = 1024, 64  # at most, of the layers that are timed
_ROWS, _IMAGES, _SIDE = 64, 4, 16
_ROUNDS = 5


def time_over_dense(layer: SparseLayer) -> float:
    """Return the time of a forward and backward pass over that of a dense layer, on the CPU.

    It is measured on new layers of the same density and kernel, of at most 1024 features or 64 channels, with a batch
    of 64 rows or four images of 16 x 16: the smallest of five times each, taken in turn. Torch's own random numbers are
    left alone.
    """
    generator = Generator().manual_seed(0)
    density = layer.nnz / math.prod(layer.shape)
    twin: SparseLayer
    if isinstance(layer, SparseConv2d):
        out, channels = (min(size, _CHANNELS) for size in layer.shape[:2])
        places = layer.kernel_size[0] * layer.kernel_size[1]
        nnz = round(density * out * channels * places)
        side = max(_SIDE, *layer.kernel_size)
        twin = SparseConv2d(
            channels, out, layer.kernel_size, nnz, layer.stride, padding=layer.kernel_size[0] // 2, generator=generator
        )
        x = torch.rand(_IMAGES, channels, side, side, generator=generator)
    else:
        out, inputs = (min(size, _FEATURES) for size in layer.shape)
        twin = SparseLinear(inputs, out, round(density * out * inputs), generator=generator)
        x = torch.rand(_ROWS, inputs, generator=generator)
    dense = twin.to_dense()
    x.requires_grad_()
    pairs = [(_seconds(twin, x), _seconds(dense, x)) for _ in range(_ROUNDS + 1)][1:]
    return min(sparse for sparse, _ in pairs) / min(other for _, other in pairs)


def _seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    with torch.enable_grad():
        layer(x).sum().backward()
    return time.perf_counter() - start
