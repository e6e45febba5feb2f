"""Products with matrices of blocks, by each backend, against dense ones."""

import pytest
import torch

from lightning_sparse.kernels import blocks, blocks_numba, numba_compiler
from lightning_sparse.kernels.block_structure import block_structure, single_nonzeros
from lightning_sparse.kernels.structure import csr
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.tiles import Tiles

#: sizes of blocks and dtypes; the first are made up of vectors of 2 and 1, and of 4
CASES = [((3, 4), torch.float64), ((16, 16), torch.float32)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def drawn(block, dtype, empty=True):
    """A weight of 4 by 5 blocks, some rows and columns of them empty, and where its nonzeros are."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(4, 5, generator=generator) < 0.5
    grid[1], grid[:, 2] = ~torch.tensor(empty), ~torch.tensor(empty)
    mask = Tiles((4 * block[0], 5 * block[1]), FIRST, *block).whole(grid)
    W = torch.randn(mask.shape, generator=generator, dtype=dtype) * mask
    return W, mask.flatten().nonzero().flatten()


@pytest.mark.parametrize(("block", "dtype"), CASES)
def test_structure_is_that_of_the_blocks_and_leads_back_to_the_nonzeros(block, dtype):
    W, positions = drawn(block, dtype)
    found = block_structure(positions.int(), W.shape, block)
    grid = Tiles(tuple(W.shape), FIRST, *block).first(W != 0)
    assert found.matrix.shape == grid.shape
    assert torch.equal(found.matrix.crow.diff(), grid.sum(1))
    assert torch.equal(found.matrix.col, grid.nonzero()[:, 1])
    assert torch.equal(found.transposed.crow.diff(), grid.sum(0))
    assert torch.equal(found.row_lengths, (W != 0).sum(1))
    ours, theirs = single_nonzeros(found), csr(positions, W.shape)
    assert torch.equal(ours.crow, theirs.crow)
    assert torch.equal(ours.col, theirs.col)
    assert ours.shape == theirs.shape
    assert ours.crow.dtype == ours.col.dtype == torch.int32


def test_what_are_no_whole_blocks_is_refused():
    W, positions = drawn((3, 4), torch.float64)
    for others in (positions[1:], positions[:-1], positions[:-1] + 1):
        with pytest.raises(ValueError, match=r"positions must be those of whole blocks of 3 x 4, got \d+ of which"):
            block_structure(others, W.shape, (3, 4))
    with pytest.raises(ValueError, match=r"block must divide the weight's shape \(12, 20\), got \(5, 4\)"):
        block_structure(positions, W.shape, (5, 4))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("n", [0, 1, 21])
@pytest.mark.parametrize(("block", "dtype"), CASES)
def test_products_equal_those_of_the_dense_weight(block, dtype, n, backend):
    W, positions = drawn(block, dtype)
    weight = block_structure(positions, W.shape, block)._replace(backend=backend)
    x, delta = torch.randn(n, W.shape[1], dtype=dtype), torch.randn(n, W.shape[0], dtype=dtype)
    values = W.flatten()[positions]
    results = {
        "forward": (blocks.matmul(x, values, weight), x @ W.t()),
        "input": (blocks.matmul_transposed(delta, values, weight), delta @ W),
        "weight": (blocks.gradient(delta, x, weight), (delta.t() @ x).flatten()[positions]),
    }
    for name, (ours, theirs) in results.items():
        assert ours.shape == theirs.shape, name
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, for tensors of a GPU")
@pytest.mark.parametrize(
    ("block", "dtype", "tolerance"),
    [((16, 16), torch.float32, 1e-5), ((16, 32), torch.float16, 1e-3), ((3, 4), torch.float32, 1e-5)],
)
def test_kernels_of_a_gpu_do_so_by_the_interpreter(block, dtype, tolerance):
    code = pytest.importorskip("lightning_sparse.kernels.blocks_triton", exc_type=ImportError)
    W, positions = drawn(block, dtype)
    weight, values = block_structure(positions, W.shape, block), W.flatten()[positions]
    x, delta = torch.randn(21, W.shape[1]).to(dtype), torch.randn(21, W.shape[0]).to(dtype)
    results = [
        (code.matmul(x, values, weight), x.double() @ W.double().t()),
        (code.matmul_transposed(delta, values, weight), delta.double() @ W.double()),
        (code.gradient(delta, x, weight), (delta.double().t() @ x.double()).flatten()[positions]),
    ]
    for ours, theirs in results:
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_threads_change_no_bit(monkeypatch):
    W, positions = drawn((16, 16), torch.float32, empty=False)
    weight, values = block_structure(positions, W.shape, (16, 16)), W.flatten()[positions]
    x, delta = torch.randn(8, 80), torch.randn(8, 64)

    def products():
        return [
            blocks_numba.matmul(x, values, weight),
            blocks_numba.matmul_transposed(delta, values, weight),
            blocks_numba.gradient(delta, x, weight),
        ]

    one = products()
    monkeypatch.setattr(numba_compiler, "_SHARED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, products(), strict=True))


def test_shapes_that_do_not_fit_are_refused():
    W, positions = drawn((3, 4), torch.float64)
    weight, values = block_structure(positions, W.shape, (3, 4)), W.flatten()[positions]
    x, delta = torch.randn(2, 19, dtype=W.dtype), torch.randn(2, 13, dtype=W.dtype)
    for product in (
        lambda: blocks.matmul(x, values, weight),
        lambda: blocks.matmul_transposed(delta, values, weight),
        lambda: blocks.gradient(delta, x, weight),
    ):
        with pytest.raises(RuntimeError, match=r"blocks of shape \(12, 20\) cannot be multiplied with"):
            product()


def test_rows_of_blocks_that_are_no_power_of_2_are_made_up_of_vectors():
    assert list(blocks_numba._pieces(21, blocks_numba._VECTOR // 8)) == [(8, 0), (8, 8), (4, 16), (1, 20)]
