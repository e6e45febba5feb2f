"""Layers that compute in one fused operation cost what their plain products do, counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightning_sparse.accounting.flops import OTHER, Flops, dense_flops, inference

BATCH, HEADS, LENGTH, WIDTH = 3, 2, 5, 8
PRODUCTS = 2 * (2 * BATCH * HEADS * LENGTH * LENGTH * WIDTH)  # with the keys, and with the values


class Attends(nn.Module):
    """Queries, keys and values are of one layer, so that all of them have a gradient."""

    def __init__(self, attend, device=None):
        super().__init__()
        self.linear, self.attend = nn.Linear(WIDTH, 3 * WIDTH, device=device), attend

    def forward(self, x):
        return self.attend(*self.linear(x).chunk(3, -1))


def attention_of(module, device=None):
    x = torch.randn(BATCH, HEADS, LENGTH, WIDTH, device=device)
    return dense_flops(module, lambda: module(x).sum())[OTHER]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, None], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(LENGTH, LENGTH)}], ids=str)
def test_attention_on_the_cpu_costs_its_products_whatever_computes_it(backend, options):
    module = Attends(lambda q, k, v: scaled_dot_product_attention(q, k, v, **options))
    with sdpa_kernel(backend or [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        assert attention_of(module) == Flops(PRODUCTS, 2 * PRODUCTS, 0)


KERNELS = {
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0],
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_on_a_gpu_costs_the_same(kernel):
    if not hasattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention"):
        pytest.skip("this torch has no such kernel")
    assert attention_of(Attends(KERNELS[kernel], "meta"), "meta") == Flops(PRODUCTS, 2 * PRODUCTS, 0)


@pytest.mark.parametrize("trains", [True, False])
def test_a_transformer_layer_costs_its_weights_and_its_attention_also_on_the_fast_path(trains):
    layer = nn.TransformerEncoderLayer(16, HEADS, 24, dropout=0.0, batch_first=True)
    if not trains:
        layer.eval().requires_grad_(False)
    head, x = nn.Linear(16, 2), torch.randn(BATCH, LENGTH, 16)
    net = nn.Sequential(layer, head)
    flops = dense_flops(net, lambda: net(x).sum())
    weights = {"self_attn.in_proj_weight": 16 * 48, "self_attn.out_proj.weight": 16 * 16}
    weights |= {"linear1.weight": 16 * 24, "linear2.weight": 24 * 16}
    for name, size in weights.items():
        assert flops[f"0.{name}"].forward == 2 * BATCH * LENGTH * size
        assert flops[f"0.{name}"].weight_gradient == 2 * BATCH * LENGTH * size * trains
    attention = 2 * (2 * BATCH * LENGTH * LENGTH * 16)
    assert flops[OTHER] == Flops(attention, 2 * attention * trains, 0)
    whole = 2 * BATCH * LENGTH * (sum(weights.values()) + 32) + attention
    assert inference(flops, {}) == whole
    assert torch.backends.mha.get_fastpath_enabled(), "as it was before"


def test_a_bilinear_layer_costs_two_operations_a_weight_and_example():
    first, second, net = nn.Linear(4, 5), nn.Linear(4, 6), nn.Bilinear(5, 6, 7)
    module, x = nn.ModuleList([first, second, net]), torch.randn(BATCH, 4)
    flops = dense_flops(module, lambda: net(first(x), second(x)).sum())
    each = 2 * BATCH * 5 * 6 * 7
    assert flops["2.weight"] == Flops(each, 2 * each, each)
    assert OTHER not in flops


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("mode", "operations"), [("sum", 2), ("mean", 2), ("max", 0)])
def test_an_embedding_bag_costs_two_operations_for_each_number_it_adds(mode, operations, sparse):
    if mode == "max" and sparse:
        return  # there is no such bag
    bag, head = nn.EmbeddingBag(10, 6, mode=mode, sparse=sparse), nn.Linear(6, 2)
    net, rows = nn.Sequential(bag, head), torch.randint(10, (BATCH, 4))
    flops = dense_flops(net, lambda: net(rows).sum())
    each = operations * BATCH * 4 * 6
    assert flops["0.weight"] == Flops(each, 0, each)
    assert flops["1.weight"] == Flops(2 * BATCH * 12, 2 * BATCH * 12, 2 * BATCH * 12)
    assert OTHER not in flops


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_costs_every_gate_and_step_both_ways(kind):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    net, x = kind(5, 4, bidirectional=True, batch_first=True), torch.randn(BATCH, 7, 5)
    flops = dense_flops(net, lambda: net(x)[0].sum())
    step = 2 * BATCH * gates * 4
    for suffix in ("", "_reverse"):
        assert flops[f"weight_ih_l0{suffix}"].forward == 7 * step * 5
        assert flops[f"weight_hh_l0{suffix}"].forward == 7 * step * 4


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_convolution_costs_the_inputs_of_its_group(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net, x = nn.Sequential(kind(4, 4, 1), kind(4, 6, 3, padding=1, groups=2)), torch.randn(BATCH, 4, 5, 5)
    flops = dense_flops(net, lambda: net(x).sum())
    each = 2 * BATCH * 25 * 6 * 2 * 9
    assert flops["1.weight"] == Flops(each, each, each)
    assert OTHER not in flops


def test_a_layer_costs_the_same_for_one_example_without_a_batch():
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)), torch.randn(5)
    flops = dense_flops(net, lambda: net(x).sum())
    assert [flops[f"{i}.weight"].forward for i in (0, 1)] == [2 * 20, 2 * 12]
