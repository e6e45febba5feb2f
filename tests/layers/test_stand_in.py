"""Sparse layers answer code of foreign modules as dense ones do, or refuse it by the weight's name."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm

from lightning_sparse.storage import SparseConv2d, SparseLinear, make_sparse_


@pytest.fixture(params=[SparseLinear, SparseConv2d])
def layer(request):
    layer = SparseLinear(6, 5, nnz=12) if request.param is SparseLinear else SparseConv2d(4, 6, 3, nnz=20, padding=1)
    layer.full_name = "net.0.weight"
    return layer


def example(layer):
    return torch.randn(2, 6) if isinstance(layer, SparseLinear) else torch.randn(2, 4, 5, 5)


def test_a_sparse_layer_is_one_of_its_dense_kind_and_has_its_attributes(layer):
    dense = layer.to_dense()
    assert isinstance(layer, type(dense))
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in dense.named_parameters()]
    for name in set(vars(dense)) - {"_parameters", "_buffers", "_non_persistent_buffers_set"}:
        assert getattr(layer, name) == getattr(dense, name), name
    assert layer.extra_repr().startswith(dense.extra_repr())
    assert torch.allclose(layer(input=example(layer)[:0]), dense(input=example(layer)[:0]))


ASKED = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "shape": lambda w: (w.shape, w.size(), w.size(0), len(w)),
    "dimensions": lambda w: (w.ndim, w.dim(), w.numel(), w.stride(), w.is_contiguous()),
    "requires_grad": lambda w: (w.requires_grad, w.data.requires_grad, w.detach().requires_grad),
    "kind": lambda w: (isinstance(w, torch.Tensor), isinstance(w, nn.Parameter), w.is_floating_point(), w.is_cuda),
    "bytes": lambda w: (w.element_size(), w.nbytes),
    "others by it": lambda w: [x.dtype for x in (torch.ones(2).to(w), torch.ones(2).type_as(w), w.new_zeros(2))],
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weight_answers_what_does_not_depend_on_elements(layer, dtype, asked):
    layer.to(dtype)
    assert ASKED[asked](layer.weight) == ASKED[asked](layer.to_dense().weight)


def test_freezing_its_weight_freezes_the_nonzeros(layer):
    layer.weight.requires_grad = False
    assert not layer.values.requires_grad
    layer.weight.requires_grad_()
    assert layer.values.requires_grad


def tie(layer):
    nn.Embedding(5, 6).weight = layer.weight


REFUSED = {
    "linear": lambda layer: functional.linear(torch.ones(1, 6), layer.weight),
    "conv2d": lambda layer: functional.conv2d(torch.ones(1, 4, 3, 3), layer.weight, layer.bias),
    "T": lambda layer: layer.weight.T,
    "mul": lambda layer: 2 * layer.weight,
    "__getitem__": lambda layer: layer.weight[0],
    "grad": lambda layer: layer.weight.grad,
    "numpy": lambda layer: layer.weight.detach().numpy(),
    "data": lambda layer: setattr(layer.weight, "data", torch.ones(layer.shape)),
    "normal_": lambda layer: layer.weight.data.normal_(),
    "uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "kaiming_uniform_": lambda layer: layer.reset_parameters(),
    "is_leaf": lambda layer: torch.optim.SGD([layer.weight], lr=0.1),
    "grad_fn": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "norm_except_dim": parametrizations.weight_norm,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_elements_is_refused_by_the_full_name(layer, what):
    with pytest.raises(
        RuntimeError, match=rf"net\.0\.weight has no elements for '{what}'.*exclude=\['net\.0\.weight'\]"
    ):
        REFUSED[what](layer)


def test_a_weight_is_not_lent_to_another_layer(layer):
    with pytest.raises(RuntimeError, match=r"net\.0\.weight has no elements for 'grad_fn'"):
        tie(layer)


def other(layer):
    return nn.Parameter(torch.ones(layer.shape))


@pytest.mark.parametrize(
    "exchange",
    [
        lambda layer: setattr(layer, "weight", other(layer)),
        lambda layer: setattr(layer, "weight", None),
        lambda layer: layer.register_parameter("weight", other(layer)),
        spectral_norm,
    ],
)
def test_a_weight_is_not_exchanged(layer, exchange):
    with pytest.raises(RuntimeError, match=r"net\.0\.weight cannot be exchanged for .* exclude=\['net\.0\.weight'\]"):
        exchange(layer)


def test_without_a_full_name_the_layer_is_shown():
    with pytest.raises(RuntimeError, match=r"weight of SparseLinear\(in_features=6, out_features=5, bias=True, nnz=3"):
        SparseLinear(6, 5, nnz=3).weight.abs()


@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 3, [False, True, True]])])
def test_a_transformer_is_evaluated_without_the_fast_path_that_reads_weights(mask):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
        for block in encoder.layers:
            make_sparse_(block.linear1, torch.arange(128))
        found = encoder(x, src_key_padding_mask=mask)
    valid = slice(None) if mask is None else ~mask
    assert torch.allclose(found[valid], expected[valid], atol=1e-5)


class Casts(nn.Module):
    """As T5 and ViT cast; asks for the layer's kind."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 8)

    def forward(self, x):
        h = self.net(x.to(self.net.weight.dtype))
        return 2 * h if isinstance(self.net, nn.Linear) and self.net.weight.shape[0] == 8 else h


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_asks_layers_computes_what_it_did(compiled):
    torch.manual_seed(0)
    module, x = Casts(), torch.randn(2, 6, dtype=torch.float64)
    expected = module(x)
    make_sparse_(module.net, torch.arange(48))
    if compiled:
        module = torch.compile(module, backend="eager")
    assert torch.allclose(module(x), expected, atol=1e-6)
