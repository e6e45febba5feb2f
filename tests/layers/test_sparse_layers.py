"""Sparse layers against dense ones with the same weights: values, gradients, state, and memory."""

import copy
import itertools
import math
import pickle
import weakref
from importlib import import_module

import large_layers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_fresh
from torch import nn

from lightning_sparse.kernels import convolutions_numba, dispatch, numba_compiler, products, products_numba
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.structure import flat_positions, structure
from lightning_sparse.storage import BlockLinear, SparseConv2d, SparseLinear, make_dense_, make_sparse_

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
BACKENDS = {
    "torch": lambda kind, _: None,
    "numba": lambda kind, _: import_module(f"lightning_sparse.kernels.{kind}_numba"),
    products.DENSE: lambda kind, _: None,
}
QUICK = settings(max_examples=60, deadline=None)


def thinned(layer, density, seed=0):
    """The layer with exact zeros: whole rows and columns, too, and all of it with density 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < density)
    return layer


def assert_close(ours, theirs, dtype):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm() + torch.finfo(dtype).tiny


def assert_equal_layers(dense, sparse, x, monkeypatch, backend):
    """Forward, and gradients of input, values and bias."""
    monkeypatch.setattr(dispatch, "module", BACKENDS[backend])
    sparse.backend = products.DENSE if backend == products.DENSE else None
    dtype = x.dtype
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = sparse(ours), dense(theirs)
    assert_close(y, expected, dtype)
    weights = torch.randn_like(expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(ours.grad, theirs.grad, dtype)
    assert_close(sparse.values.grad, dense.weight.grad.reshape(-1)[sparse.positions], dtype)
    if dense.bias is not None:
        assert_close(sparse.bias.grad, dense.bias.grad, dtype)


dtypes = st.sampled_from([torch.float32, torch.float64])
densities = st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0])


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(
    out=st.integers(1, 9),
    inputs=st.integers(1, 9),
    leading=st.lists(st.integers(0, 4), max_size=3),
    density=densities,
    bias=st.booleans(),
    dtype=dtypes,
)
def test_linear_equals_dense(backend, out, inputs, leading, density, bias, dtype):
    dense = thinned(nn.Linear(inputs, out, bias, dtype=dtype), density)
    with pytest.MonkeyPatch.context() as patch:
        assert_equal_layers(
            dense, SparseLinear.from_dense(dense), torch.randn(*leading, inputs, dtype=dtype), patch, backend
        )


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(data=st.data(), density=densities, bias=st.booleans(), dtype=dtypes)
def test_convolution_equals_dense(backend, data, density, bias, dtype):
    groups, kernel = data.draw(st.integers(1, 3)), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    channels, filters = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    stride, dilation = data.draw(pair), data.draw(pair)
    padding = data.draw(st.sampled_from([0, 1, (0, 2), "valid", *(["same"] if stride == (1, 1) else [])]))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    options = {"bias": bias, "padding_mode": mode, "dtype": dtype}
    dense = thinned(nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, **options), density)
    space = data.draw(st.tuples(st.integers(5, 8), st.integers(5, 8)))
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, channels, *space, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sparse.kernels.geometry._CHUNK", data.draw(st.sampled_from([1, 1 << 20])))
        assert_equal_layers(dense, SparseConv2d.from_dense(dense), x, patch, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 13, 128, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copied", [False, True])
def test_products_are_right_beyond_a_vector_a_tile_and_on_several_threads(backend, n, dtype, copied, monkeypatch):
    monkeypatch.setattr(numba_compiler, "_SHARED_FROM", 1)
    monkeypatch.setattr(products_numba, "_REPAYS", 1 if copied else 1 << 20)
    monkeypatch.setattr(products_numba, "_CACHED", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    dense = thinned(nn.Linear(40, 30, dtype=dtype), 0.3)
    with torch.no_grad():
        dense.weight[:20] = 0  # threads get rows by their nonzeros
    x = torch.randn(n, 40, dtype=dtype)
    assert_equal_layers(dense, SparseLinear.from_dense(dense), x, monkeypatch, backend)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (16, 32), (8, 24), (37, 50), (64, 3), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_transpose_is_the_transpose(shape, dtype):
    X = torch.randn(shape, dtype=dtype, requires_grad=True)
    every_other = torch.randn(2 * shape[0], shape[1], dtype=dtype)[::2]
    for matrix in (X, X.t(), every_other):
        turned = products_numba.transposed(matrix)
        assert torch.equal(turned, matrix.t())
        assert turned.is_contiguous()


@pytest.mark.parametrize("n", [100, 128, 300])
def test_compiled_products_do_not_depend_on_vectors_tiles_and_threads(n, monkeypatch):
    layer = SparseLinear(200, 90, nnz=6000, generator=torch.Generator().manual_seed(0))
    csr, values, X = layer.structure.matrix, layer.values.detach(), torch.randn(200, n)
    product = products_numba.matmul(csr, values, X)
    gradient = products_numba.sampled(csr, product, X)
    monkeypatch.setattr(numba_compiler, "_SHARED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(products_numba.sampled(csr, product, X), gradient)
    monkeypatch.setattr(products_numba, "_REPAYS", 1)
    monkeypatch.setattr(products_numba, "_CACHED", 1 << 14)
    assert torch.equal(products_numba.matmul(csr, values, X), product)
    monkeypatch.setattr(products_numba, "_VECTOR", 64)
    assert torch.equal(products_numba.matmul(csr, values, X), product)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 12])
def test_a_gradient_that_shows_one_number_many_times_is_read_as_such(backend, size, monkeypatch):
    monkeypatch.setattr(dispatch, "module", BACKENDS[backend])
    for dense, x in (
        (thinned(nn.Conv2d(3, 4, 3), 0.5), torch.randn(2, 3, size, size)),
        (thinned(nn.Linear(6, 5), 0.5), torch.randn(size, 6)),
    ):
        sparse = (SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d).from_dense(dense)
        dense(x).sum().backward()
        sparse(x).sum().backward()
        assert_close(sparse.values.grad, dense.weight.grad.reshape(-1)[sparse.positions], x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_another_size_are_refused(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "module", BACKENDS[backend])
    for layer, x in (
        (SparseLinear(200, 30, nnz=2000), torch.randn(16, 20)),
        (SparseConv2d(64, 8, 3, nnz=2000), torch.randn(2, 3, 9, 9)),
    ):
        with pytest.raises(RuntimeError, match=r"A sparse weight of shape .* cannot be multiplied with"):
            layer(x)


def test_numba_is_chosen_where_it_is_installed_unless_torch_is_forced(kernel):
    assert products.backend(torch.zeros(1)).__name__.endswith(f"products_{kernel}")
    assert products.backend(torch.zeros(1, dtype=torch.bfloat16)).__name__.endswith("products_torch")


def test_structure_by_hand():
    positions = torch.tensor([1, 3, 4, 6])  # of 4 filters that read 2 channels each, in 2 groups
    found = structure(positions, (4, 2), groups=2)
    assert found.matrix.crow.tolist() == [0, 1, 2, 3, 4]
    assert found.matrix.col.tolist() == [1, 1, 2, 2]
    assert found.transposed.crow.tolist() == [0, 0, 2, 4, 4]
    assert found.transposed.col.tolist() == [0, 1, 2, 3]
    assert found.permutation.tolist() == [0, 1, 2, 3]
    assert torch.equal(flat_positions(found.matrix.crow, found.matrix.col, (4, 2)), positions)
    assert {part.dtype for part in (*found.matrix[:2], *found.transposed[:2], found.permutation)} == {torch.int32}


@pytest.mark.parametrize("shape", [(70_000, 40_000), (7, 4)])
def test_positions_may_be_int32_in_weights_of_any_size(shape):
    positions = torch.tensor([5, 13, 27]) if shape[0] == 7 else torch.tensor([5, 120_007, 2**31 - 5])
    for ours, theirs in zip(
        structure(positions.int(), shape).tensors, structure(positions, shape).tensors, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert structure(positions, shape).matrix.crow[-1] == 3


# ---------------------------------------------------------------------- layers as modules


@pytest.fixture(params=["linear", "conv"])
def layer(request):
    torch.manual_seed(0)
    if request.param == "linear":
        return SparseLinear(6, 5, nnz=12)
    return SparseConv2d(4, 6, (3, 2), nnz=20, groups=2, padding=1)


def example(layer):
    return torch.randn(2, 6) if isinstance(layer, SparseLinear) else torch.randn(2, 4, 5, 5)


def test_a_loss_that_lives_on_does_not_keep_the_connections_of_its_step(layer):
    loss = layer(example(layer)).sum()
    loss.backward()
    before = [weakref.ref(x) for x in layer.structure.tensors]
    layer.set_connections(layer.positions[1:], layer.values.detach()[1:])
    assert loss.isfinite()
    assert [x() for x in before] == [None] * 5


def test_training_goes_on_with_a_state_that_was_loaded_in_inference_mode(layer):
    other = type(layer).from_dense(layer.to_dense(), layer.positions[2:])
    with torch.inference_mode():
        layer.load_state_dict({name: x.clone() for name, x in other.state_dict().items()})
    layer(example(layer)).sum().backward()
    assert layer.values.grad.shape == (layer.nnz,) == (other.nnz,)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_transpose_does_not_depend_on_how_much_is_sorted_at_once(chunk, monkeypatch):
    monkeypatch.setattr("lightning_sparse.kernels.positions_torch._CHUNK", chunk)
    weight = torch.zeros(6, 4, 3)
    positions = torch.randperm(72, generator=torch.Generator().manual_seed(0))[:30].sort().values
    weight.view(-1)[positions] = torch.arange(1.0, 31)
    found = structure(positions, weight.shape, groups=2)
    matrix = torch.block_diag(*weight.flatten(1).chunk(2))
    for csr, values, expected in (
        (found.matrix, torch.arange(1.0, 31), matrix),
        (found.transposed, torch.arange(1.0, 31)[found.permutation], matrix.t()),
    ):
        assert torch.equal(torch.sparse_csr_tensor(csr.crow, csr.col, values, csr.shape).to_dense(), expected)
        for first, last in itertools.pairwise(csr.crow.tolist()):
            assert csr.col[first:last].tolist() == sorted(csr.col[first:last].tolist())
    assert torch.equal(flat_positions(found.matrix.crow, found.matrix.col, weight.shape), positions)


@pytest.mark.parametrize("kind", ["linear", "conv", "blocks"])
def test_the_structure_of_moved_connections_is_that_of_their_positions(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "blocks":
        layer = BlockLinear(8, 6, blocks=5, block=(2, 2), generator=generator)
        marks = torch.randperm(12, generator=generator) < 5
        marks = marks.view(3, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    else:
        layer = SparseLinear(6, 5, nnz=12) if kind == "linear" else SparseConv2d(4, 6, (3, 2), nnz=20, groups=2)
        marks = torch.rand(math.prod(layer.shape), generator=generator) < 0.4
    held = torch.zeros(len(marks), dtype=torch.bool)
    held[layer.positions] = True
    dropped, grown = (held & ~marks).nonzero().squeeze(1), (marks & ~held).nonzero().squeeze(1)
    again = dropped[:0] if kind == "blocks" else dropped[:1]  # dropped and grown
    after = torch.cat((marks.nonzero().squeeze(1), again)).sort().values
    found, source = layer.structure_moved(dropped, torch.cat((grown, again)).sort().values)
    expected = layer.structure_at(after)
    assert all(torch.equal(x, y) for x, y in zip(found.tensors, expected.tensors, strict=True))
    assert (found.matrix.shape, found.block) == (expected.matrix.shape, expected.block)
    both = torch.cat((layer.positions, torch.cat((grown, again)).sort().values))
    assert torch.equal(both[source], after)


def test_a_new_layer_has_exactly_the_nonzeros_asked_for_scaled_by_the_fan_in_that_is_there(layer):
    fan_in = (layer.dense_weight() != 0).flatten(1).sum(1)
    assert int(fan_in.sum()) == layer.nnz == len(layer.positions.unique())
    largest = layer.dense_weight().flatten(1).abs().amax(1)
    assert (largest <= fan_in.clamp(min=1).rsqrt()).all()
    assert largest.max() > 0.5 * fan_in.max().rsqrt()


@pytest.mark.parametrize(
    ("nnz", "rule"), [(-1, "an integer of at least 0"), (31, "from 0 to 30, the size of the dense weight")]
)
def test_more_nonzeros_than_there_are_places_are_refused(nnz, rule):
    with pytest.raises(ValueError, match=f"nnz must be {rule}, got {nnz}"):
        SparseLinear(6, 5, nnz)


def test_state_of_another_number_of_nonzeros_is_taken_up(layer):
    other = type(layer).from_dense(thinned(layer.to_dense(), 0.5))
    assert other.nnz != layer.nnz
    parameter = other.values
    assert set(layer.state_dict()) == {"values", "bias", "crow", "col", "weight_shape"}
    other.load_state_dict(layer.state_dict())
    assert other.values is parameter
    x = example(layer)
    assert torch.equal(other(x), layer(x))
    other(x).sum().backward()
    assert other.values.grad.shape == (layer.nnz,)


def test_state_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"belong to a weight of shape \[5, 6\], not \[5, 7\]"):
        SparseLinear(7, 5, 12).load_state_dict(SparseLinear(6, 5, 12).state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_whole_and_apart(layer, duplicate):
    other, x = duplicate(layer), example(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.values.zero_()
    assert layer.values.any()


def test_there_and_back_gives_the_same_dense_layer(layer):
    dense = layer.to_dense()
    dense.register_buffer("scale", torch.ones(1))  # of the user
    twin, names = copy.deepcopy(dense), list(dense.state_dict())
    attributes = set(dense.__dict__)
    sparse = make_sparse_(dense, layer.positions)
    assert sparse is dense
    assert next(sparse.parameters()) is sparse.values, "in the place of the weight"
    back = make_dense_(sparse)
    assert type(back) is type(twin)
    assert list(back.state_dict()) == names
    assert set(back.__dict__) == attributes
    assert torch.equal(back.weight, twin.weight)
    assert repr(back) == repr(twin)


def test_hooks_stay_with_a_layer_made_sparse_in_place():
    dense, seen = nn.Linear(6, 5), []
    dense.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    make_sparse_(dense, torch.tensor([1, 7]))(torch.randn(2, 6))
    assert seen == [SparseLinear]


def test_exchanged_connections_take_effect_and_keep_the_parameter(layer):
    parameter, x = layer.values, example(layer)
    layer(x).sum().backward()
    layer.set_connections(torch.tensor([0, 3]), torch.tensor([2.0, -1.0]))
    assert layer.values is parameter
    expected = torch.zeros(layer.shape)
    expected.view(-1)[[0, 3]] = torch.tensor([2.0, -1.0])
    assert torch.equal(layer.dense_weight(), expected)
    assert torch.allclose(layer(x), layer.to_dense()(x), atol=1e-6)


def test_autocast_gives_what_it_gives_dense_layers(layer):
    x, dense = example(layer), layer.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), dense(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours.float(), theirs.float(), atol=2e-2)
    ours.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_pass_may_run_within_autocast(layer, backend, monkeypatch):
    monkeypatch.setattr(dispatch, "module", BACKENDS[backend])
    x, gradients = example(layer).requires_grad_(), []
    for within in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x).float().sum()
            if within:
                gradients.append(torch.autograd.grad(loss, [layer.values, x]))
        if not within:
            gradients.append(torch.autograd.grad(loss, [layer.values, x]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_layers_train(layer):
    layer, x = layer.bfloat16(), example(layer).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert {y.dtype, layer.values.grad.dtype, x.grad.dtype, layer.bias.grad.dtype} == {torch.bfloat16}
    assert layer.col.dtype == torch.int32


def test_input_of_another_dtype_is_refused_as_by_dense_layers(layer):
    with pytest.raises(RuntimeError, match=r"must have the same dtype: torch\.float64, torch\.float32"):
        layer(example(layer).double())


def test_second_derivatives_are_refused(layer):
    x = example(layer).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_gradients_that_nobody_asked_for_are_not_computed(layer, monkeypatch):
    layer.values.requires_grad_(False)
    monkeypatch.setattr("lightning_sparse.layers.functional.sampled", None)
    monkeypatch.setattr("lightning_sparse.layers.functional._matmul_transposed", None)
    monkeypatch.setattr("lightning_sparse.kernels.products.sampled", None)
    monkeypatch.setattr(Geometry, "fold", None)
    monkeypatch.setattr(convolutions_numba, "_input_gradient", None)
    monkeypatch.setattr(convolutions_numba, "sampled", None)
    layer(example(layer)).sum().backward()
    assert layer.values.grad is None
    assert layer.bias.grad is not None


def test_other_layers_have_no_sparse_form():
    with pytest.raises(TypeError, match=r"Only nn\.Linear and nn\.Conv2d have a sparse form, not Conv1d"):
        make_sparse_(nn.Conv1d(2, 2, 1), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"layer must be an nn\.Conv2d for SparseConv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(2, 2))


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_training_never_takes_the_memory_of_the_dense_weight(kind):
    added, dense = run_fresh(large_layers.added_by_training, kind)
    assert added < 0.05 * dense
