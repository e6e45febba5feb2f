"""Layers of blocks against dense ones with the same weights, and against layers of single nonzeros."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.tiles import Tiles
from lightning_sparse.storage import BlockLinear, SparseLinear, make_blocks_, make_dense_

BLOCK = 3, 4


def dense(bias=True, dtype=torch.float64, seed=0):
    """A layer whose weight has 7 of 20 blocks."""
    layer = nn.Linear(20, 12, bias, dtype=dtype)
    grid = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).flatten().argsort().view(4, 5) < 7
    with torch.no_grad():
        layer.weight *= Tiles((12, 20), FIRST, *BLOCK).whole(grid)
    return layer


@pytest.mark.parametrize("backend", ["torch", "numba", "dense"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_values_and_gradients_equal_those_of_the_dense_layer(leading, backend):
    theirs = dense()
    ours = BlockLinear.from_dense(theirs, block=BLOCK)
    ours.backend = backend
    x, y = (torch.randn(*leading, 20, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x)
    (ours(x) ** 2).sum().backward()
    (theirs(y) ** 2).sum().backward()
    torch.testing.assert_close(ours(x), theirs(y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.values.grad, theirs.weight.grad.flatten()[ours.positions])
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_gradients_are_those_of_differences():
    layer = BlockLinear(8, 6, 4, (3, 4), dtype=torch.float64)
    layer.backend = "torch"
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, values, bias: layer(x), (x, layer.values, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_low_precision_compute_in_float32(dtype):
    theirs = dense(dtype=dtype)
    layer = BlockLinear.from_dense(theirs, block=BLOCK)
    layer.backend = "torch"
    x = torch.randn(5, 20, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.values.grad.dtype == dtype
    expected = nn.functional.linear(x.float(), theirs.weight.float(), theirs.bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_layer_shows_its_nonzeros_as_a_layer_of_single_ones_does():
    theirs = SparseLinear.from_dense(dense())
    layer = BlockLinear.from_dense(dense_again := theirs.to_dense(), block=BLOCK)
    for name in ("values", "crow", "col", "positions", "shape", "nnz"):
        a, b = getattr(layer, name), getattr(theirs, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    assert layer.block_col.shape == (7,)
    assert sum(x.numel() for x in layer.structure.tensors) == 5 + 7 + 6 + 7 + 7
    assert torch.equal(layer.dense_weight(), dense_again.weight)
    assert layer.weight.shape == (12, 20)
    assert "nnz=84 (0.35), block=(3, 4)" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.dense_weight(), layer.dense_weight())
    plain = make_dense_(layer)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, dense_again.weight)
    assert vars(plain).keys() == vars(nn.Linear(2, 2)).keys()


@pytest.mark.parametrize(("writes", "reads"), [("block", "block"), ("block", "sparse"), ("sparse", "block")])
def test_a_state_is_that_of_single_nonzeros_and_loads_into_either(writes, reads):
    def made(kind, seed):
        layer = dense(seed=seed)
        return SparseLinear.from_dense(layer) if kind == "sparse" else BlockLinear.from_dense(layer, block=BLOCK)

    ours, theirs = made(writes, 0), made(reads, 1)
    state = ours.state_dict()
    assert set(state) == {"values", "crow", "col", "weight_shape", "bias"}
    theirs.load_state_dict(state)
    assert torch.equal(theirs.dense_weight(), ours.dense_weight())
    assert torch.equal(theirs.bias, ours.bias)
    with pytest.raises(RuntimeError, match="Missing key"):
        theirs.load_state_dict({name: x for name, x in state.items() if name != "crow"})
    fewer = SparseLinear.from_dense(dense(seed=1)).state_dict()
    fewer.update(values=fewer["values"][:0], col=fewer["col"][:0], crow=torch.zeros_like(fewer["crow"]))
    theirs.load_state_dict(fewer)
    assert theirs.nnz == 0


def test_a_state_of_other_than_whole_blocks_is_refused_and_changes_nothing():
    layer = BlockLinear.from_dense(dense(), block=BLOCK)
    before = layer.dense_weight()
    with pytest.raises(RuntimeError, match="whole blocks of 3 x 4"):
        layer.load_state_dict(SparseLinear(20, 12, 84, dtype=torch.float64).state_dict())
    assert torch.equal(layer.dense_weight(), before)
    with pytest.raises(ValueError, match="whole blocks of 3 x 4"):
        layer.set_connections(torch.arange(12), torch.ones(12))


def test_layers_are_drawn_with_exactly_so_many_blocks():
    layer = BlockLinear(40, 30, 11, (3, 4), generator=torch.Generator().manual_seed(0))
    tiles = Tiles((30, 40), FIRST, 3, 4)
    mask = layer.dense_weight() != 0
    assert tiles.fits(mask)
    assert tiles.first(mask).sum() == 11
    bound = mask.sum(1).clamp(min=1).rsqrt()
    assert (layer.dense_weight().abs() <= bound[:, None]).all()
    with pytest.raises(ValueError, match=r"blocks must be from 0 to 100, as many as fit, got 101"):
        BlockLinear(40, 30, 101, (3, 4))
    with pytest.raises(ValueError, match=r"block must divide the weight's shape \(30, 40\)"):
        BlockLinear(40, 30, 5, (4, 4))
    with pytest.raises(TypeError, match=r"Only nn\.Linear and SparseLinear have a form of blocks, not Conv2d"):
        make_blocks_(nn.Conv2d(4, 4, 1), (2, 2))
