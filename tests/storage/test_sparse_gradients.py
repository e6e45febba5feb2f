"""Gradients of sparse layers: clipped, scaled and read as with masks, never of the size of the dense weight."""

from importlib import import_module

import large_layers
import pytest
import torch
from helpers import (
    Largest,
    Scaler,
    Unmixed,
    fit,
    seeded,
)
from processes import run_fresh
from stored import METHODS, NETWORKS, OnMeta, measured, run, tokens
from torch import nn

import lightning_sparse.storage.layer_backends as layer_backends
import lightning_sparse.storage.sparse as training
from lightning_sparse.rules import select
from lightning_sparse.storage import SparseLinear
from lightning_sparse.weights.base import optimizer_state
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.sparse import SparseWeight

# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize("method", ["MemoryEfficientDST grabo", "RigL", "GGR", "MEST", "MEST soft bound"])
@pytest.mark.parametrize(
    "options",
    [
        lambda: {"accumulate_grad_batches": 2, "max_epochs": 3},
        lambda: {"gradient_clip_val": 0.1},
        lambda: {"plugins": [Unmixed(Scaler())], "precision": None},
    ],
    ids=["accumulated", "clipped", "scaled"],
)
def test_what_lightning_does_with_gradients_is_as_with_masks(method, options):
    ours, theirs = (
        run(METHODS[method](storage=storage, update_every=5, seed=3), tokens, **options())[0]
        for storage in ("sparse", "masked")
    )
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["RigL", "GGR"])
def test_growth_does_not_depend_on_how_many_rows_are_looked_at_at_once(method, network, monkeypatch):
    expected, _ = run(METHODS[method](storage="sparse", seed=3), NETWORKS[network])
    monkeypatch.setattr("lightning_sparse.weights.captured._CHUNK", 1)
    module, _ = run(METHODS[method](storage="sparse", seed=3), NETWORKS[network])
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in expected.state_dict().items())


@pytest.mark.parametrize("method", ["RigL", "GGR", "ITOP gradient", "ITOP random", "MEST", "MEST soft bound", "DSR"])
def test_no_tensor_is_near_the_size_of_the_dense_weight(method, monkeypatch):
    """Nor of its gradient, in the whole of a fit with updates; ITOP has a bit for each weight."""
    monkeypatch.setattr(
        layer_backends, "measure_all", measured({"numba": 0.5, "dense": 1.0})
    )  # Largest sees no CSR tensor
    import_module("lightning_sparse.kernels.products_torch")  # which makes one
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    monkeypatch.setattr("lightning_sparse.weights.captured._CHUNK", 1 << 14)

    class Wide(OnMeta):
        def configure_model(self):
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 300), nn.Linear(300, 4))

    module = seeded(Wide)
    with Largest() as largest:
        fit(METHODS[method](storage="sparse", sparsity=0.98, update_every=2, min_layer_density=0.0), module)
    assert type(module.net[2]) is SparseLinear
    rows = (1 << 14) // 4 // 300
    assert largest.size <= 300 * 300 / (8 if "ITOP" in method else 10)
    if method in ("RigL", "GGR"):
        assert rows * 300 <= largest.size, "they look at some rows at a time"


def test_equal_gradients_grow_by_position():
    """As with masks, whatever is looked at at once; gradients of whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(30, 20, 60, generator=generator)
    h, delta = (torch.randint(-1, 2, (4, n), generator=generator).float() for n in (30, 20))
    weight = SparseWeight("weight", (20, 30), layer)
    weight.gradient.calls = [(h[:1], delta[:1]), (h[1:], delta[1:])]
    dense = MaskedWeight("weight", weight.mask, parameter=nn.Parameter(layer.dense_weight()))
    dense.parameter.grad = delta.t() @ h
    for n in (0, 1, 5, 50, 200, 540):
        positions, gradients = weight.largest_gradients(n)
        expected = select.top_k(dense.dP.abs(), n, among=~dense.mask).reshape(-1).nonzero().squeeze(1)
        assert torch.equal(positions, expected)
        assert torch.equal(gradients, dense.dP.abs().reshape(-1)[expected])
        for theirs, ours in zip(dense.largest_gradients(n), (positions, gradients), strict=True):
            assert torch.equal(theirs, ours)
    assert (weight.largest_gradients(540)[1] == weight.largest_gradients(540, at_least=1.0)[1].min()).any()


def test_a_sparse_weight_keeps_what_a_masked_one_does():
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(30, 20, 200, generator=generator)
    with torch.no_grad():
        layer.values.copy_(torch.randint(1, 6, (200,), generator=generator))  # many equals
    sparse = SparseWeight("weight", (20, 30), layer)
    masked = MaskedWeight("weight", sparse.mask, nn.Parameter(layer.dense_weight()))
    for weight in (sparse, masked):
        weight.optimizer = torch.optim.Adam([weight.parameter])
        weight.parameter.grad = torch.ones_like(weight.parameter)
        weight.optimizer.step()
    kept = torch.rand(20, 30, generator=generator) < 0.7
    largest = select.top_k(layer.dense_weight().abs() * kept, 50)
    for move in (lambda weight: weight.keep(kept), lambda weight: weight.keep(largest)):
        move(sparse)
        move(masked)
        assert torch.equal(sparse.mask, masked.mask)
        assert torch.equal(layer.dense_weight(), masked.W)
        assert sparse.values.shape == next(iter(optimizer_state(sparse)))[1].shape
    assert layer.nnz == 50


@pytest.mark.parametrize(("x", "finite"), [(1.0, True), (3e38, False), (float("inf"), False), (float("nan"), False)])
def test_gradients_of_connections_that_do_not_exist_have_to_be_finite_too(x, finite):
    layer = SparseLinear(3, 2, 1)
    weight = SparseWeight("weight", (2, 3), layer)
    layer.values.grad = torch.zeros(1)
    assert weight.finite
    weight.gradient.calls = [
        (torch.ones(2, 3), torch.tensor([[1.0, 1.0], [1.0, x]])),
        (torch.ones(0, 3), torch.ones(0, 2)),
    ]
    weight.gradient.calls.append((torch.ones(2, 3), torch.tensor([[1.0, 1.0], [1.0, x]])))
    assert weight.finite == finite


def test_bfloat16_autocast_trains():
    module, _ = fit(METHODS["MemoryEfficientDST grabo"](storage="sparse"), precision="bf16-mixed")
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_layer_of_65536_by_65536_trains_and_moves_connections_in_little_memory():
    """Dense it takes 17 GB, for each of weight, gradient and momentum."""
    assert run_fresh(large_layers.peak_of_65536_by_65536) < 1.5e9
