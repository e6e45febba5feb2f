"""How long a sparse layer takes with each backend, and a dense one: a short measurement on this machine."""

import math
import time
from functools import partial

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.accounting.timing import seconds
from lightning_sparse.kernels.products import candidates
from lightning_sparse.layers.sparse import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["DENSE", "measure"]

DENSE = "dense"

_FEATURES, _CHANNELS = 1024, 64  # at most, of the layers that are timed
_ROWS, _IMAGES, _SIDE = 64, 4, 16
_ROUNDS, _SECONDS = 5, 1.0  # at most, but for the round that is under way


def measure(layer: SparseLayer) -> dict[str, float]:
    """Return the seconds of a forward and backward pass with each backend, and under ``DENSE`` those of a dense layer.

    They are measured on new layers of the same density, kernel and device, of at most 1024 features or 64 channels,
    with a batch of 64 rows or four images of 16 x 16: the smallest of up to five times each, taken in turn, after one
    that does not count, in about a second. Torch's own random numbers are left alone.
    """
    generator = Generator().manual_seed(0)
    density = layer.nnz / math.prod(layer.shape)
    device, dtype = layer.values.device, torch.promote_types(layer.values.dtype, torch.float32)
    twin: SparseLayer
    if isinstance(layer, SparseConv2d):
        out, channels = (min(size, _CHANNELS) for size in layer.shape[:2])
        places = layer.kernel_size[0] * layer.kernel_size[1]
        nnz = round(density * out * channels * places)
        side, padding = max(_SIDE, *layer.kernel_size), layer.kernel_size[0] // 2
        twin = SparseConv2d(
            channels, out, layer.kernel_size, nnz, layer.stride, padding, generator=generator, dtype=dtype
        )
        x = torch.rand(_IMAGES, channels, side, side, generator=generator, dtype=dtype)
    else:
        out, inputs = (min(size, _FEATURES) for size in layer.shape)
        twin = SparseLinear(inputs, out, round(density * out * inputs), generator=generator, dtype=dtype)
        x = torch.rand(_ROWS, inputs, generator=generator, dtype=dtype)
    twin, x = twin.to(device), x.to(device).requires_grad_()
    dense, names = twin.to_dense(), candidates(device, dtype)
    best = dict.fromkeys([*names, DENSE], math.inf)
    start = time.perf_counter()
    for round_ in range(_ROUNDS + 1):
        for name in best:
            twin.backend = name
            taken = seconds(partial(_pass, dense if name == DENSE else twin, x), 1, device)
            if round_:
                best[name] = min(best[name], taken)
        if round_ == 0:
            start = time.perf_counter()  # the first one may compile
        elif time.perf_counter() - start > _SECONDS:
            break
    return best


def _pass(layer: nn.Module, x: Tensor) -> None:
    with torch.enable_grad():
        layer(x).sum().backward()
