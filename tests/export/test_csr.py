"""Layers that hold their weight as a CSR matrix compute what dense ones do."""

import copy
import io

import pytest
import torch
from exported import same_results, sparse_mlp, untouched
from helpers import prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparse.export import (
    CSRConv2d,
    CSRLinear,
    to_csr,
)
from lightning_sparse.kernels.geometry import Geometry

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def conv(width=8):
    return nn.Conv2d(3, width, 3)


# ---------------------------------------------------------------------- CSR


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 1),
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_csr_linear_equals_dense_for_any_leading_dimensions(inputs, outputs, sparsity, leading, bias, dtype):
    linear = nn.Linear(inputs, outputs, bias, dtype=dtype)
    linear.weight.data *= torch.rand_like(linear.weight) >= sparsity
    layer = CSRLinear(linear)
    assert layer.weight.layout == torch.sparse_csr
    assert layer.weight.crow_indices().dtype == layer.weight.col_indices().dtype == torch.int32
    assert layer.values.numel() == torch.count_nonzero(linear.weight)
    x = torch.randn(*leading, inputs, dtype=dtype)
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    assert layer(x).shape == linear(x).shape


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 5, 7), (6, 5, 7)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_csr_convolution_equals_dense(shape, stride):
    conv = nn.Conv2d(6, 4, 1, stride=stride)
    conv.weight.data *= torch.rand_like(conv.weight) > 0.7
    x = torch.randn(shape)
    assert torch.allclose(CSRConv2d(conv)(x), conv(x), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(), sparsity=st.floats(0, 1), bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_csr_convolution_equals_dense_for_any_geometry(data, sparsity, bias, dtype):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups, kernel, stride, dilation = data.draw(st.integers(1, 3)), data.draw(pair), data.draw(pair), data.draw(pair)
    channels, filters = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    padding = data.draw(st.sampled_from([0, 1, (0, 2), "valid", *(["same"] if stride == (1, 1) else [])]))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    options = {"bias": bias, "padding_mode": mode, "dtype": dtype}
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, **options)
    conv.weight.data *= torch.rand_like(conv.weight) >= sparsity
    layer = CSRConv2d(conv)
    assert layer.values.numel() == torch.count_nonzero(conv.weight)
    x = torch.randn(*data.draw(st.sampled_from([(), (0,), (3,)])), channels, 8, 7, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sparse.kernels.geometry._CHUNK", data.draw(st.sampled_from([1, 1 << 20])))
        assert layer(x).shape == conv(x).shape
        assert torch.allclose(layer(x), conv(x), atol=1e-5)


def test_csr_layers_hand_gradients_to_their_input():
    conv, x = prune(nn.Conv2d(4, 6, 3, 2, 1, groups=2)), torch.randn(3, 4, 6, 6, requires_grad=True)
    expected, found = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (conv, CSRConv2d(conv)))
    assert torch.allclose(found, expected, atol=1e-4)


def test_csr_convolutions_unfold_only_where_compiled_loops_cannot_compute(monkeypatch):
    conv, x = prune(nn.Conv2d(4, 6, 3, 2, 1, groups=2)), torch.randn(8, 4, 9, 9)
    layer = CSRConv2d(conv)
    monkeypatch.setattr(Geometry, "unfold", None)
    assert torch.allclose(layer(x), conv(x), atol=1e-5)
    with pytest.raises(TypeError, match="NoneType"):
        layer(x.requires_grad_())


@pytest.mark.parametrize("batch", [1, 2, 16, 150])
def test_csr_layers_compute_alike_for_few_and_many_examples(batch, kernel):
    linear, x = prune(nn.Linear(30, 20)), torch.randn(batch, 30)
    layer, given = CSRLinear(linear), x.clone().requires_grad_()
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    expected, found = (torch.autograd.grad(f(given).square().sum(), given)[0] for f in (linear, layer))
    assert torch.allclose(found, expected, atol=1e-5)


def test_csr_layers_can_be_traced_with_many_examples(kernel):
    module = to_csr(nn.Sequential(prune(nn.Linear(30, 20)), nn.ReLU()), min_sparsity=0.0)
    with torch.no_grad():
        traced, x = torch.jit.trace(module, torch.randn(20, 30)), torch.randn(20, 30)
        assert torch.allclose(traced(x), module(x), atol=1e-5)


def test_a_kernel_larger_than_the_input_is_refused():
    with pytest.raises(RuntimeError, match=r"kernel is larger than the padded input of \(4, 8\)"):
        CSRConv2d(nn.Conv2d(2, 2, 5))(torch.ones(1, 2, 4, 8))


def test_only_layers_that_are_sparse_enough_are_converted_and_the_original_stays():
    net = sparse_mlp()
    before = copy.deepcopy(net.state_dict())
    csr = to_csr(net)
    assert [type(layer) for layer in csr] == [CSRLinear, nn.ReLU, nn.Linear]
    assert untouched(net, before)
    x = torch.randn(3, 40)
    assert torch.allclose(csr(x), net(x), atol=1e-5)
    assert isinstance(to_csr(net[0]), CSRLinear), "a layer by itself"
    assert isinstance(to_csr(net, min_sparsity=0.0)[2], CSRLinear)


def test_convolutions_that_are_sparse_enough_are_converted():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten())
    net[2].weight.data.view(-1)[14:] = 0  # 5 %
    csr = to_csr(net)
    assert [type(layer) for layer in csr] == [nn.Conv2d, nn.ReLU, CSRConv2d, nn.Flatten]
    assert str(csr[2]) == "CSRConv2d(8, 8, kernel_size=(3, 3), stride=(2, 2), groups=2, nonzeros=14)"
    assert same_results(net, csr, torch.randn(5, 3, 9, 9))


def test_csr_modules_can_be_pickled_and_load_the_state_of_another_number_of_nonzeros():
    csr, other = to_csr(sparse_mlp()), to_csr(sparse_mlp(0.99))
    file = io.BytesIO()
    torch.save(csr, file)
    file.seek(0)
    x = torch.randn(3, 40)
    assert torch.equal(torch.load(file, weights_only=False)(x), csr(x))
    assert csr[0].values.numel() != other[0].values.numel()
    other.load_state_dict(csr.state_dict())
    assert torch.equal(other(x), csr(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_csr_layers_compute_in_their_own_precision_under_autocast():
    csr = to_csr(sparse_mlp())
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert csr[0](x.bfloat16()).dtype == torch.float32
        assert torch.allclose(csr[0](x), csr[0](x))


def test_layers_whose_weights_their_parent_uses_stay_dense():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        encoder.linear1.weight.zero_()
        encoder.self_attn.out_proj.weight.zero_()
    net = nn.Sequential(encoder, sparse_mlp()[0].__class__(8, 8))
    net[1].weight.data.zero_()
    csr = to_csr(net)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.allclose(csr(x), net(x), atol=1e-5)
    assert isinstance(csr[1], CSRLinear)
    assert type(csr[0].linear1) is nn.Linear


def test_csr_warns_if_nothing_is_sparse_enough_and_refuses_a_wrong_share():
    with pytest.warns(UserWarning, match=r"No layer was converted.*at least 90%"):
        to_csr(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"min_sparsity must be a number from 0 to 1, got 90"):
        to_csr(nn.Linear(4, 4), min_sparsity=90)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="of torch 2.7 and newer")
@pytest.mark.parametrize(
    ("net", "x"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(20, 6)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(75, 4)), torch.randn(3, 2, 5, 5)),
    ],
)
def test_csr_layers_go_through_torch_export_and_a_file(net, x):
    csr = to_csr(net(), min_sparsity=0.0)
    assert any(isinstance(layer, (CSRLinear, CSRConv2d)) for layer in csr)
    file = io.BytesIO()
    torch.export.save(torch.export.export(csr, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.allclose(loaded.module()(x), csr(x), atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="of torch 2.7 and newer")
def test_an_exported_csr_layer_takes_any_number_of_examples():
    csr = to_csr(nn.Sequential(nn.Linear(6, 5)), min_sparsity=0.0)
    program = torch.export.export(csr, (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for n in (2, 4, 33):
        x = torch.randn(n, 6)
        assert torch.allclose(program.module()(x), csr(x), atol=1e-6)
