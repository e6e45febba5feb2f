"""Training with torch's operators for 2:4 weights on a GPU that has them."""

import pytest
import torch
from helpers import Lit, fit, loader, seeded
from torch import nn

from lightning_sparse import SRSTE
from lightning_sparse.kernels import semi_structured as kernels
from lightning_sparse.layers.semi_structured import linear_2_4
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.transposable import largest_tiles

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < kernels.CAPABILITY,
    reason="needs a GPU of compute capability 8.0",
)


@pytest.mark.parametrize("rows", [(3,), (2, 40)])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_output_and_gradients_are_those_of_a_dense_layer(dtype, rows):
    torch.manual_seed(0)
    shapes = (128, 192), (*rows, 192), (*rows, 128), (128,)
    W, x, dy, b = (torch.randint(-2, 3, shape, device="cuda").to(dtype) for shape in shapes)
    W = W * largest_tiles(W.abs(), FIRST, 2)  # whole numbers, whose sums are exact here
    results = []
    for function in (lambda *given: linear_2_4(*given, both=True), nn.functional.linear):
        leaves = [each.clone().requires_grad_() for each in (x, W, b)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(ours, dense) for ours, dense in zip(*results, strict=True))


def three_layers():
    return nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


def test_training_is_that_of_dense_products(monkeypatch):
    monkeypatch.setattr(kernels, "PAYS", 64)
    weights = []
    for semi_structured in (False, True):
        module = seeded(lambda: Lit(three_layers(), lambda p: torch.optim.SGD(p, lr=0.01)))
        callback = SRSTE(transposable=True, semi_structured=semi_structured)
        fit(callback, module, loader(32), accelerator="cuda", devices=1, precision="bf16-mixed", max_epochs=1)
        weights.append(module.net[2].weight.detach().cpu())
    assert torch.allclose(*weights, atol=1e-2)
