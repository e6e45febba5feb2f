import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparse.accounting.flops import OTHER, Average, Flops, dense_flops, inference, training
from lightning_sparse.accounting.masks import (
    Explored,
    cells,
    churn,
    empty_inputs,
    empty_neurons,
    mask_bits,
    shrunk_size,
    spread,
)
from lightning_sparse.accounting.memory import stored_bytes
from lightning_sparse.kernels import products, products_torch
from lightning_sparse.layers.sparse import SparseConv2d, SparseLinear
from lightning_sparse.rules.select import positions
from lightning_sparse.zoo.models import LeNet5Caffe, LeNet300, SequenceLSTM

BATCH = 8


def counted(module, x):
    y = torch.zeros(len(x), dtype=torch.long)
    return dense_flops(module, lambda: cross_entropy(module(x), y))


def expected(forward, first=False):
    return Flops(forward, 0 if first else forward, forward)


def test_lenet300_counts_two_operations_a_weight_and_image():
    flops = counted(LeNet300(), torch.randn(BATCH, 1, 28, 28))
    assert flops == {
        "fc1.weight": expected(2 * BATCH * 784 * 300, first=True),
        "fc2.weight": expected(2 * BATCH * 300 * 100),
        "fc3.weight": expected(2 * BATCH * 100 * 10),
    }


def test_lenet5_counts_two_operations_a_weight_image_and_output_position():
    flops = counted(LeNet5Caffe(), torch.randn(BATCH, 1, 28, 28))
    assert flops == {
        "conv1.weight": expected(2 * BATCH * 20 * 25 * 24 * 24, first=True),
        "conv2.weight": expected(2 * BATCH * 50 * 20 * 25 * 8 * 8),
        "fc1.weight": expected(2 * BATCH * 800 * 500),
        "fc2.weight": expected(2 * BATCH * 500 * 10),
    }


def test_each_weight_of_an_lstm_counts_every_time_step():
    flops = counted(SequenceLSTM(inputs=5, hidden=4, layers=2, classes=3), torch.randn(BATCH, 1, 7, 5))
    step = 2 * BATCH * 16
    assert flops["lstm.weight_ih_l0"] == expected(7 * step * 5, first=True)
    assert flops["lstm.weight_ih_l1"] == expected(7 * step * 4)
    # the first hidden state is a constant
    assert flops["lstm.weight_hh_l0"] == Flops(7 * step * 4, 6 * step * 4, 7 * step * 4)
    assert flops["fc.weight"] == expected(2 * BATCH * 4 * 3)
    assert OTHER not in flops


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_convolution_costs_its_share(groups):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Conv2d(8, 4, 1, groups=groups))
    x = torch.randn(BATCH, 4, 6, 6)
    flops = dense_flops(net, lambda: net(x).sum())
    assert flops["0.weight"] == expected(2 * BATCH * 8 * (4 // groups) * 9 * 16, first=True)
    assert flops["1.weight"] == expected(2 * BATCH * 4 * (8 // groups) * 16)


def test_attention_tells_weights_from_products_of_activations():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(BATCH, 5, 16)
    flops = dense_flops(attention, lambda: attention(x, x, x)[0].sum())
    assert flops["in_proj_weight"] == expected(2 * BATCH * 5 * 16 * 48, first=True)
    assert flops["out_proj.weight"] == expected(2 * BATCH * 5 * 16 * 16)
    products = 2 * (2 * BATCH * 5 * 5 * 16)
    assert flops[OTHER] == Flops(products, 2 * products, 0)


class Attends(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (LeNet5Caffe(), (1, 28, 28)),
        (SequenceLSTM(inputs=5, hidden=4, layers=2, classes=3), (1, 7, 5)),
        (Attends(16, 2, batch_first=True), (5, 16)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), SparseLinear(128, 5, nnz=9)), (4, 6, 6)),
    ],
    ids=["convolutions", "recurrent", "attention", "groups and sparse"],
)
def test_autocast_changes_no_count(net, shape):
    x = torch.randn(BATCH, *shape)

    def loss(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return net(x).float().square().sum()

    plain = dense_flops(net, lambda: loss(False))
    assert plain.keys() - {OTHER}
    assert dense_flops(net, lambda: loss(True)) == plain


def test_a_tied_weight_counts_every_use_under_its_first_name():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    x = torch.randn(BATCH, 6)
    flops = dense_flops(net, lambda: net(x).sum())
    use = 2 * BATCH * 36
    assert flops == {"0.weight": Flops(2 * use, use, 2 * use)}


def test_a_frozen_weight_has_no_gradient_to_compute():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    net[1].requires_grad_(False)
    x = torch.randn(BATCH, 6)
    assert dense_flops(net, lambda: net(x).sum())["1.weight"] == Flops(2 * BATCH * 12, 2 * BATCH * 12, 0)


@pytest.mark.parametrize("net", [LeNet300(), LeNet5Caffe()], ids=["lenet300", "lenet5"])
def test_the_sum_is_that_of_torchs_counter(net):
    x = torch.randn(BATCH, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    flops = dense_flops(net, lambda: net(x).sum())
    assert training(flops, {}, {}) == counter.get_total_flops()


def test_counting_leaves_gradients_alone():
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.grad.clone()
    dense_flops(net, lambda: net(torch.ones(4, 3)).sum())
    assert torch.equal(net.weight.grad, before)


def test_densities_scale_the_passes_they_belong_to():
    flops = {"a": Flops(100, 0, 100), "b": Flops(40, 40, 40), OTHER: Flops(7, 14, 0)}
    assert inference(flops, {"a": 0.1, "b": 0.5}) == 10 + 20 + 7
    assert training(flops, {"a": 0.1, "b": 0.5}, {"a": 0.3, "b": 1.0}) == (10 + 30) + (20 + 20 + 40) + (7 + 14)
    assert training(flops, {}, {}) == 200 + 120 + 21


def test_the_average_is_over_all_values():
    average = Average()
    for value in (1.0, 2.0, 6.0):
        average.add(value)
    assert average.mean == 3.0
    average.add(0.0, times=3)
    assert (average.total, average.count) == (9.0, 6)


def test_empty_neurons_and_inputs_are_counted_over_kernels_and_groups():
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[0, 1, 1, 0] = mask[3, 1, 0, 0] = mask[3, 2, 0, 1] = True
    assert empty_neurons(mask) == 2
    assert empty_inputs(mask) == 1
    assert empty_inputs(mask, groups=2) == 3, "of 6: group 0 reads its input 1, group 1 its inputs 1 and 2"
    assert shrunk_size(mask) == 2 * 2 * 4
    assert shrunk_size(mask, groups=2) == (1 * 1 + 1 * 2) * 4, (
        "group 0 keeps an output and an input, group 1 one and two"
    )
    assert (empty_neurons(mask[:0]), shrunk_size(torch.zeros(2, 3, dtype=torch.bool))) == (0, 0)


@pytest.mark.parametrize("compiled", [True, False])
def test_sparse_layers_count_as_the_dense_ones_they_stand_for(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(products, "backend", lambda *_: products_torch)
    sparse = nn.Sequential(
        SparseConv2d(4, 8, 3, nnz=40, groups=2), nn.ReLU(), nn.Flatten(), SparseLinear(128, 5, nnz=9), nn.Linear(5, 2)
    )
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5), nn.Linear(5, 2))
    x = torch.randn(BATCH, 4, 6, 6)
    ours = dense_flops(sparse, lambda: sparse(x).square().sum())
    assert ours == dense_flops(dense, lambda: dense(x).square().sum())
    assert ours["0.weight"] == expected(2 * BATCH * 8 * 2 * 9 * 16, first=True)


def test_a_picture_averages_over_cells_of_nearly_equal_size():
    mask = torch.rand(300, 1000, generator=torch.Generator().manual_seed(0)) < 0.3
    picture = cells(mask)
    assert picture.shape == (128, 128)
    for i, j in ((0, 0), (57, 90), (127, 127)):
        rows, columns = (slice(k * n // 128, (k + 1) * n // 128) for k, n in ((i, 300), (j, 1000)))
        assert picture[i, j] == mask[rows, columns].double().mean()
    assert torch.equal(cells(mask[:100, :7]), mask[:100, :7].double())


def test_a_large_mask_is_pictured_band_by_band():
    mask = torch.ones(1100, 2000, dtype=torch.bool)
    mask[550:] = False
    assert torch.equal(cells(mask, most=2), torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))


def test_the_spread_of_equal_values_is_one_bin():
    assert spread(torch.full((4,), 2.0)) == {"min": 2.0, "mean": 2.0, "max": 2.0, "counts": [4], "edges": [2.0, 2.0]}


def test_churn_is_0_for_equal_masks_1_for_disjoint_ones_and_weighs_by_connections():
    a, b = torch.tensor([True] * 3 + [False] * 7), torch.tensor([False] * 7 + [True] * 3)
    bits = {"a": mask_bits(a), "b": mask_bits(b)}
    assert churn(bits, bits) == 0
    assert churn({"a": bits["a"]}, {"a": bits["b"]}) == 1
    assert churn(bits, {"a": bits["a"], "b": bits["a"]}) == 6 / 12
    assert churn({"a": mask_bits(a & b)}, {"a": mask_bits(a & b)}) == 0


def test_what_was_active_once_stays_explored():
    explored = Explored()
    for position in (0, 3, 3, 9):
        mask = torch.zeros(10, dtype=torch.bool)
        mask[position] = True
        explored.add("a", mask)
    assert explored.rate(["a"]) == 0.3
    explored.start("a", torch.tensor([9]), 10)
    assert explored.rate(["a"]) == 0.1


def test_positions_are_explored_as_masks_are():
    mask, more = (torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in (0, 1))
    by_mask, by_position = Explored(), Explored()
    by_position.start("a", positions(mask), 21)
    by_position.mark("a", positions(more))
    for x in (mask, more):
        by_mask.add("a", x)
    assert torch.equal(by_position.bits["a"], by_mask.bits["a"])
    assert by_position.sizes == by_mask.sizes


def test_each_memory_is_counted_once():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    shared = torch.zeros(10)
    found = stored_bytes(net, [optimizer], [{"W": net[0].weight, "a": shared, "rest": [shared[2:]]}])
    parameters = 4 * (6 + 2 + 2 + 2)
    assert found["weights"] == found["gradients"] == parameters
    assert found["buffers"] == 4 * (2 + 2) + 8
    assert found["optimizer_state"] == 2 * parameters + 4 * 4, "two moments, and a step count for each parameter"
    assert found["method"] == 40
