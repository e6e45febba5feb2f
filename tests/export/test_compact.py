"""Compaction: what has no weights goes, and the network computes what it computed."""

import copy

import pytest
import torch
from exported import Model, residual, same_results, sizes
from helpers import prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_sparse.accounting.masks import shrunk_size
from lightning_sparse.export import (
    compact,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------- compact: what is removed


def test_a_network_worked_by_hand_loses_what_has_no_weights():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        # neuron 1 has no inputs and gives relu(0.5); neuron 2 of the second layer is read by nobody
        net[0].weight.copy_(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 3, 0]]))
        net[0].bias.copy_(torch.tensor([0.1, 0.5, -0.2]))
        net[2].weight.copy_(torch.tensor([[1.0, 4, 0], [0, 2, 0], [0, 0, 1]]))
        net[2].bias.copy_(torch.tensor([0.3, -3.0, 0.0]))
        net[4].weight.copy_(torch.tensor([[1.0, 2, 0], [3, 4, 0]]))
    small, report = compact(net, torch.randn(5, 4))
    # then neuron 2 of the first layer is read by nobody, neuron 1 of the second is relu(2 * 0.5 - 3) = 0
    assert sizes(report) == {"0": (1, 2), "2": (1, 1), "4": (2, 1)}
    assert small.get_submodule("2").weight.tolist() == [[1.0]]
    assert small.get_submodule("2").bias.tolist() == pytest.approx([0.3 + 4 * 0.5])
    assert torch.equal(small.get_submodule("4").bias, net[4].bias)
    assert small.get_submodule("select_0").indices.tolist() == [0, 2]
    assert [(layer.removed_outputs, layer.removed_inputs) for layer in report.layers] == [(2, 2), (2, 2), (0, 2)]
    assert report.parameters == (15 + 12 + 8, 3 + 2 + 4)
    assert same_results(net, small, torch.randn(50, 4))


def test_without_dead_neurons_between_layers_the_size_is_that_of_ggrs_table_4():
    net = nn.Sequential(nn.Linear(20, 10, bias=False))
    with torch.no_grad():
        net[0].weight[:, ::3] = 0
    _, report = compact(nn.Sequential(*net, nn.ReLU(), nn.Linear(10, 2)), torch.randn(2, 20))
    assert report.layers[0].parameters[1] == shrunk_size(net[0].weight != 0) == 10 * 13


def test_without_select_a_layer_keeps_inputs_that_must_stay_and_the_report_says_so():
    net = prune(nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2)), inputs=0.5)
    small, report = compact(net, torch.randn(2, 20), select=False)
    assert report.layers[0].after[1] == 20
    assert "given by" in str(report)
    assert not any("select" in name for name, _ in small.named_modules())
    assert same_results(net, small, torch.randn(9, 20))


ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(0.2), nn.ELU(), nn.Hardswish()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_constants_pass_through_activations(activation):
    layers = [nn.Linear(12, 20), activation, nn.Dropout(0.5), nn.Linear(20, 20), activation, nn.Linear(20, 3)]
    net = prune(nn.Sequential(*layers))
    small, report = compact(net, torch.randn(3, 12))
    alive = ~(net[0].weight == 0).all(1) & ~(net[3].weight == 0).all(0)
    assert report.layers[0].after[0] <= alive.sum() < 20
    assert not report.not_followed
    assert same_results(net, small, torch.randn(40, 12))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0, 1, "same"]),
    st.booleans(),
    st.booleans(),
)
def test_random_convolutional_networks_stay_equal_whatever_is_pruned(seed, outputs, inputs, padding, norm, bias):
    torch.manual_seed(seed)
    layers, channels = [], 3
    for width in (6, 5, 7):
        layers += [nn.Conv2d(channels, width, 3, padding=padding, bias=bias)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.LeakyReLU()]
        channels = width
    layers += [nn.AvgPool2d(3, padding=1), nn.Flatten(), nn.LazyLinear(4)]
    net = nn.Sequential(*layers)
    x = torch.randn(2, 3, 10, 10)
    net(x)
    prune(net, outputs, inputs, seed=seed)
    small, report = compact(net, x)
    assert same_results(net, small, torch.randn(3, 3, 10, 10))
    assert report.parameters[1] <= report.parameters[0] + 18, "a bias may come to a convolution that had none"


def test_one_constant_stands_for_all_behind_zero_padding():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        net[0].weight[:6] = 0
        net[0].bias.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0, 0.3, 0.1, 0.0, 0.0]))
    small, report = compact(net, torch.randn(2, 3, 9, 9))
    assert sizes(report) == {"0": (3, 3), "2": (4, 3)}, "five constants become one; relu(-1) = 0 goes"
    assert "1 output: a constant that cannot go into the bias of 2, which pads with zeros" in str(report)
    assert same_results(net, small, torch.randn(2, 3, 17, 6))


@pytest.mark.parametrize("padding", [{}, {"padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}])
def test_where_no_zeros_are_padded_constants_go_into_the_bias(padding):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False, **padding), nn.Flatten())
    with torch.no_grad():
        net[0].weight[:6] = 0
        net[0].bias.fill_(0.5)
    small, report = compact(net, torch.randn(2, 3, 9, 9))
    assert sizes(report) == {"0": (2, 3), "2": (4, 2)}
    assert small.get_submodule("2").bias is not None
    assert net[2].bias is None
    assert same_results(net, small, torch.randn(2, 3, 12, 12))


def test_a_channel_that_batch_norm_scales_by_0_goes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten())
    with torch.no_grad():
        net[1].weight[:5] = 0
        net[1].bias.fill_(0.7)
    small, report = compact(net.eval(), torch.randn(2, 3, 5, 5))
    assert sizes(report) == {"0": (3, 3), "3": (2, 3)}
    assert same_results(net, small, torch.randn(4, 3, 5, 5))


def test_an_average_over_padding_is_not_constant_at_the_border():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(4, 2, 1), nn.Flatten())
    with torch.no_grad():
        net[0].weight[:2] = 0
        net[0].bias.fill_(1.0)
    small, report = compact(net, torch.randn(2, 1, 4, 4))
    assert sizes(report)["0"] == (4, 1)
    assert same_results(net, small, torch.randn(2, 1, 4, 4))


def test_a_layer_without_any_weight_keeps_one_output_and_one_input():
    net = prune(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), outputs=1.0)
    small, report = compact(net, torch.randn(2, 5))
    assert sizes(report) == {"0": (1, 1), "2": (1, 1), "4": (2, 1)}
    assert "a layer keeps one output at least" in str(report)
    assert same_results(net, small, torch.randn(3, 5))


def test_a_channel_of_a_residual_sum_goes_only_if_all_that_is_added_is_constant():
    net = Model(residual, a=nn.Linear(6, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 4), head=nn.Linear(4, 2))
    with torch.no_grad():
        net.a.weight[0] = net.a.weight[1] = 0
        net.c.weight[0] = net.c.weight[2] = 0
    small, report = compact(net, torch.randn(3, 6))
    assert sizes(report) == {"a": (3, 6), "b": (5, 2), "c": (3, 5), "head": (2, 3)}
    assert "a: 1 output: in use elsewhere: a sum" in str(report)
    assert same_results(net, small, torch.randn(20, 6))


def test_a_loop_of_channels_that_feed_only_one_another_goes():
    net = Model(residual, a=nn.Linear(6, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 4), head=nn.Linear(4, 2))
    with torch.no_grad():
        net.head.weight[:, 3] = net.b.weight[1:, 3] = net.c.weight[:3, 0] = 0  # b's output 0 serves channel 3 alone
    small, report = compact(net, torch.randn(3, 6))
    assert sizes(report) == {"a": (3, 6), "b": (4, 3), "c": (3, 4), "head": (2, 3)}
    assert same_results(net, small, torch.randn(20, 6))


# ---------------------------------------------------------------------- compact: through which networks


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_torchvision_shrink_and_stay_equal(name):
    net = prune(getattr(pytest.importorskip("torchvision.models"), name)(num_classes=10))
    small, report = compact(net, torch.randn(2, 3, 40, 40))
    assert not report.not_followed
    assert report.parameters[1] < 0.35 * report.parameters[0]
    assert report.parameters[1] == sum(p.numel() for p in small.parameters())
    assert same_results(net, small, torch.randn(2, 3, 33, 50))


def test_depthwise_convolutions_shrink_with_their_channels():
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 4, 1), nn.Flatten()),
    )
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].bias[0] = -1.0  # relu6: 0, so that zero padding does no harm
        net[2].weight[1] = 0  # a constant, whatever it reads
        net[5].weight[:, 2] = 0  # read by nobody
        net[0].weight[3] = 0
        net[0].bias[3] = 1.0  # not constant behind the depthwise padding
    small, report = compact(net.eval(), torch.randn(2, 3, 6, 6))
    assert sizes(report) == {"0": (5, 3), "5": (4, 5)}
    assert small.get_submodule("2").groups == 5
    assert same_results(net, small, torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, 96),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(start_dim=1),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.transpose(1, 2).contiguous().view(x.size(0), -1),
    ],
    ids=["view", "view(-1, 96)", "reshape", "flatten", "method", "permute", "transpose"],
)
def test_ways_to_flatten(flatten):
    net = Model(
        lambda m, x: m.head(flatten(functional.max_pool2d(m.conv(x), 2))),
        conv=nn.Conv2d(3, 6, 3),
        head=nn.Linear(96, 4),
    )
    prune(net)
    small, report = compact(net, torch.randn(2, 3, 10, 10))
    assert not report.not_followed
    out = report.layers[0].after[0]
    assert out < 6
    assert report.layers[1].before == (4, 96)
    assert report.layers[1].after[1] <= 16 * out
    assert same_results(net, small, torch.randn(5, 3, 10, 10))


def squeeze(m, x):
    x = functional.silu(m.conv(x))
    return m.head((x * torch.sigmoid(m.up(torch.relu(m.down(x.mean([2, 3], keepdim=True)))))).mean([2, 3]))


def upsample(m, x):
    return m.b(functional.interpolate(m.a(x), scale_factor=2, mode="bilinear"))


def conv(width=8):
    return nn.Conv2d(3, width, 3)


# forward, layers by name, and the shape of the input
FORWARDS = {
    "squeeze and excitation": (
        squeeze,
        {"conv": conv(), "down": nn.Conv2d(8, 6, 1), "up": nn.Conv2d(6, 8, 1), "head": nn.Linear(8, 2)},
        (2, 3, 8, 8),
    ),
    "concatenation": (
        lambda m, x: m.c(torch.relu(torch.cat([m.a(x), m.b(x)], 1))),
        {"a": nn.Linear(9, 7), "b": nn.Linear(9, 8), "c": nn.Linear(15, 2)},
        (2, 9),
    ),
    "a sequence": (
        lambda m, x: m.b(torch.tanh(2 * m.a(x) - 1)),
        {"a": nn.Linear(9, 8), "b": nn.Linear(8, 5)},
        (2, 4, 9),
    ),
    "a flattened sequence": (
        lambda m, x: m.b(m.a(x).flatten(1)),
        {"a": nn.Linear(9, 8), "b": nn.Linear(32, 5)},
        (2, 4, 9),
    ),
    "channels last": (
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)),
        {"a": conv(), "b": nn.Linear(8, 5)},
        (2, 3, 6, 6),
    ),
    "no batch": (
        lambda m, x: m.b(torch.relu(m.a(x))).flatten(),
        {"a": conv(), "b": nn.Conv2d(8, 5, 3)},
        (3, 8, 8),
    ),
    "one dimension": (
        lambda m, x: m.b(m.n(m.a(x)).flatten(1)),
        {"a": nn.Conv1d(3, 8, 3), "n": nn.BatchNorm1d(8), "b": nn.Linear(64, 5)},
        (2, 3, 10),
    ),
    "upsampling": (upsample, {"a": conv(), "b": nn.Conv2d(8, 4, 1)}, (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_channels_are_followed_through(name):
    forward, layers, shape = FORWARDS[name]
    net = prune(Model(forward, **copy.deepcopy(layers)), weights=0.1)
    small, report = compact(net, torch.randn(shape))
    assert not report.not_followed
    assert report.layers[0].removed_outputs > 0
    assert same_results(net, small, torch.randn(shape))
