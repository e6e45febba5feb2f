"""Convolutions for registers of 64 bytes: test_convolutions.py calls ``differences`` in a fresh process."""

import os

import numba
import torch
from torch import nn

from lightning_sparse.storage import SparseConv2d


def differences(folder):
    """Return how far results and gradients are from those of the dense layer, over their norm."""
    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(folder)  # what others have compiled is narrower
    from lightning_sparse.kernels import convolutions_numba

    convolutions_numba._LINE = 64  # read when it compiles
    dense = nn.Conv2d(5, 6, 3, 2, 1).double()
    layer = SparseConv2d.from_dense(dense, torch.arange(0, 270, 2))
    dense.weight.data.view(-1)[1::2] = 0
    x = torch.randn(20, 5, 9, 9).double()
    delta = torch.randn_like(dense(x))
    results = []
    for one in (layer, dense):
        h = x.clone().requires_grad_()
        y = one(h)
        y.backward(delta)
        results.append((y.detach(), h.grad))
    pairs = [*zip(*results, strict=True), (layer.values.grad, dense.weight.grad.view(-1)[::2])]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]
