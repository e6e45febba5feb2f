"""Every export computes what the module computes, is smaller where it says so, and refuses what it cannot do."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from helpers import SETTINGS, Largest, Lit, effective, fit, mlp, prune, seeded, two_of_four
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_sparse.accounting.ledger import shrunk_size
from lightning_sparse.export import (
    Benchmark,
    CSRConv2d,
    CSRLinear,
    Measurement,
    benchmark,
    compact,
    fits_2_4,
    load_sparse,
    save_sparse,
    to_csr,
    to_onnx,
    to_semi_structured,
)
from lightning_sparse.export import measure as measuring
from lightning_sparse.storage import SparseConv2d, SparseLinear, load_dense, to_dense
from lightning_sparse.storage import sparse as training

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def same_results(module, small, *inputs, tolerance=1e-5):
    with torch.no_grad():
        expected = module(*inputs)
        return (small(*inputs) - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def sizes(report):
    return {layer.name: layer.after for layer in report.layers}


def untouched(module, before):
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Model(nn.Module):
    """Layers by name, and a forward given as a function of the module and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


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


def residual(m, x):
    y = torch.relu(m.a(x))
    return m.head(torch.relu(y + m.c(torch.relu(m.b(y)))))


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


# ---------------------------------------------------------------------- compact: what stays


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(5, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 2),
        )
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.mlp(x))


def test_what_is_not_followed_stays_and_what_is_around_it_shrinks():
    net = prune(Attention())
    small, report = compact(net, torch.randn(2, 6, 5))
    assert sizes(report)["embed"][0] == 8
    assert sizes(report)["mlp.1"][0] < 12
    assert report.not_followed["attention"] == "MultiheadAttention is not followed"
    assert "mlp.0: LayerNorm is not followed" in str(report)
    assert same_results(net, small, torch.randn(3, 4, 5))


def twice(m, x):
    return m.head(torch.relu(m.a(torch.relu(m.a(x)))))


def directly(m, x):
    return functional.linear(torch.relu(m.a(x)), m.a.weight)


def in_place(m, x):
    y = m.a(x)
    y.relu_()
    return m.head(y)


def shape_used(m, x):
    y = m.a(x)
    return m.head(y) / y.shape[1]


def sliced(m, x):
    return m.head(torch.relu(m.a(x))[:, [5, 4, 3, 2, 1, 0]])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (twice, "it is called several times"),
        (directly, "its parameters are in use elsewhere"),
        (in_place, "it changes in place what others read"),
        (shape_used, "the module asks for the number of features"),
        (sliced, "getitem is not followed"),
    ],
)
def test_what_could_break_is_left_alone_with_its_reason(forward, reason):
    net = prune(Model(forward, a=nn.Linear(6, 6), head=nn.Linear(6, 2)))
    small, report = compact(net, torch.randn(2, 6), select=False)
    assert all(layer.before == layer.after for layer in report.layers)
    assert reason in report.not_followed.values()
    assert same_results(net, small, torch.randn(3, 6))


def test_tied_layers_and_layers_with_hooks_stay():
    net = prune(nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))))
    net[2].weight = net[1].weight
    net[4].register_forward_hook(lambda *_: None)
    small, report = compact(net, torch.randn(2, 6), select=False)
    assert report.not_followed == {
        "1": "its parameters are in use elsewhere",
        "2": "its parameters are in use elsewhere",
        "4": "it has forward hooks",
    }
    assert same_results(net, small, torch.randn(3, 6))


def test_groups_of_several_channels_stay():
    net = prune(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1), nn.Flatten()))
    small, report = compact(net, torch.randn(2, 3, 6, 6))
    assert report.not_followed == {"1": "its 2 groups must stay of equal size"}
    assert sizes(report)["0"][0] == 8
    assert same_results(net, small, torch.randn(2, 3, 6, 6))


def test_batch_norm_without_running_statistics_is_left_alone():
    net = prune(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    net = nn.Sequential(*net, nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)).eval()
    _, report = compact(net, torch.randn(4, 6))
    assert report.not_followed == {"2": "without running statistics its result depends on the batch"}


def test_the_original_is_not_changed_and_keeps_its_modes():
    net = prune(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    )
    net.train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    small, _ = compact(net, torch.randn(2, 3, 6, 6))
    assert untouched(net, before)
    assert [net.training, net[0].training, net[1].training] == [True, True, False]
    assert not small.training
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_a_compacted_module_can_be_pickled_and_goes_on_training():
    net = prune(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)))
    small, _ = compact(net, torch.randn(2, 12))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(4, 12)
    assert torch.equal(loaded(x), small(x))
    loaded(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = prune(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))).to(dtype)
    small, report = compact(net, torch.randn(2, 12, dtype=dtype))
    assert report.layers[0].removed_outputs > 0
    assert next(small.parameters()).dtype == dtype
    x = torch.randn(5, 12, dtype=dtype)
    assert same_results(net, small, x, tolerance=1e-12 if dtype == torch.float64 else 0.05)


RESULTS = {
    "DST": {"alpha": 0.02},
    **{name: {"sparsity": 0.95} for name in ("RigL", "GMP", "SNIP", "GGR", "SET")},
    "SET sparse": {"sparsity": 0.95, "storage": "sparse"},
}


def convolutions():
    layers = [nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


@pytest.mark.filterwarnings("ignore:storage='sparse'", "ignore:.*val_dataloader")
@pytest.mark.parametrize("network", [mlp, convolutions])
@pytest.mark.parametrize("name", RESULTS)
def test_what_methods_have_trained_is_exported(name, network, tmp_path):
    callback = SETTINGS[name.split()[0]](**RESULTS[name])
    module, _ = fit(callback, seeded(lambda: Lit(network())), max_epochs=4)
    assert effective(module, callback)
    x = torch.randn(8, 12)
    small, report = compact(module, x)
    assert report.parameters[1] < report.parameters[0]
    assert same_results(module.eval(), small, x)
    csr = to_csr(module, min_sparsity=0.5)
    assert any(isinstance(layer, CSRLinear) for layer in csr.modules())
    assert same_results(module, csr, x)
    save_sparse(module, tmp_path / "file")
    plain = Lit(network())
    plain.load_state_dict(load_sparse(tmp_path / "file"))
    assert untouched(plain, module.state_dict())


@pytest.mark.filterwarnings("ignore:storage='sparse'", "ignore:.*val_dataloader")
def test_what_is_sparse_after_a_fit_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    module, _ = fit(SETTINGS["SET"](storage="sparse"), seeded(lambda: Lit(convolutions())))
    assert type(module.net[3]) is SparseConv2d
    x = torch.randn(8, 12)
    with pytest.raises(ValueError, match=r"compact needs dense weights, but .* sparse: net\.1, net\.3, net\.7\."):
        compact(module, x)
    assert same_results(module.eval(), to_csr(module), x)
    save_sparse(module, tmp_path / "file")
    plain = Lit(convolutions()).eval()
    plain.load_state_dict(load_sparse(tmp_path / "file"))
    assert same_results(module, plain, x)


def branches(m, x):
    return m.a(x) if x.sum() > 0 else m.a(-x)


def test_a_module_that_cannot_be_traced_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"(?s)torch.fx cannot trace Model.*module.backbone = compact"):
        compact(Model(branches, a=nn.Linear(3, 3)), torch.randn(2, 3))


def test_a_random_module_is_refused():
    net = Model(lambda m, x: functional.dropout(m.a(x), 0.5, True), a=nn.Linear(30, 30))
    with pytest.raises(RuntimeError, match=r"differs from the module by .* If the module is random"):
        compact(net, torch.randn(2, 30))


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
        patch.setattr("lightning_sparse.layers.functional._CHUNK", data.draw(st.sampled_from([1, 1 << 20])))
        assert layer(x).shape == conv(x).shape
        assert torch.allclose(layer(x), conv(x), atol=1e-5)


def test_csr_layers_hand_gradients_to_their_input():
    conv, x = prune(nn.Conv2d(4, 6, 3, 2, 1, groups=2)), torch.randn(3, 4, 6, 6, requires_grad=True)
    expected, found = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (conv, CSRConv2d(conv)))
    assert torch.allclose(found, expected, atol=1e-4)


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


def sparse_mlp(sparsity=0.95):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 4))
    with torch.no_grad():
        net[0].weight *= torch.rand_like(net[0].weight) > sparsity
    return net


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


# ---------------------------------------------------------------------- sparse layers


def sparse_net():
    """As a fit leaves it with ``storage="sparse"`` if dense weights would be too large."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(SparseConv2d(3, 8, 3, nnz=60, padding=1), nn.ReLU(), SparseConv2d(8, 6, 3, nnz=9, stride=2, groups=2)),
        *(nn.Flatten(), SparseLinear(54, 40, nnz=90), nn.ReLU(), nn.Linear(40, 4)),
    )


def test_sparse_layers_become_csr_whatever_their_sparsity():
    net = sparse_net()
    before = copy.deepcopy(net.state_dict())
    csr = to_csr(net)
    assert [type(csr[i]) for i in (0, 2, 4, 6)] == [CSRConv2d, CSRConv2d, CSRLinear, nn.Linear]
    assert untouched(net, before)
    assert not {x.data_ptr() for x in csr.state_dict().values()} & {x.data_ptr() for x in net.state_dict().values()}
    x = torch.randn(5, 3, 8, 8)
    assert same_results(to_dense(copy.deepcopy(net)), csr, x)
    assert isinstance(to_csr(SparseLinear(4, 3, nnz=6)), CSRLinear)


def test_no_dense_weight_is_made_for_csr_and_files(tmp_path):
    net = nn.Sequential(SparseLinear(300, 300, nnz=900), SparseConv2d(100, 100, 3, nnz=900))
    with Largest() as largest:
        to_csr(net)
        save_sparse(net, tmp_path / "file")
    assert 900 <= largest.size < 300 * 300 / 10


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("compact", lambda net, path: compact(net, torch.randn(2, 3, 8, 8))),
        ("to_onnx", lambda net, path: to_onnx(net, path, torch.randn(2, 3, 8, 8))),
        ("to_semi_structured", lambda net, path: to_semi_structured(net)),
    ],
)
def test_what_needs_dense_weights_names_the_sparse_layers_and_the_remedy(name, export, tmp_path):
    remedy = r"Give it lightning_sparse\.storage\.to_dense\(copy\.deepcopy\(module\)\).* take 0\.0 MiB"
    with pytest.raises(ValueError, match=rf"{name} needs dense .* layers are sparse: 0, 2, 4\. {remedy}"):
        export(sparse_net(), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"are sparse: the module\..* take 4\.0 MiB"):
        export(SparseLinear(1024, 1024, nnz=5), tmp_path / "net.onnx")


def test_with_the_remedy_sparse_layers_are_compacted():
    net, x = sparse_net(), torch.randn(2, 3, 8, 8)
    small, report = compact(to_dense(copy.deepcopy(net)), x)
    assert report.parameters[1] < report.parameters[0]
    assert same_results(net, small, x)


def test_files_of_sparse_layers_are_loaded_by_the_plain_module(tmp_path):
    net = sparse_net()
    dense = to_dense(copy.deepcopy(net))
    for state in (net, net.state_dict()):  # a checkpoint of nonzeros alone has such a state dict
        save_sparse(state, tmp_path / "file")
        loaded = load_sparse(tmp_path / "file")
        assert loaded.keys() == dense.state_dict().keys() == load_dense({"state_dict": net.state_dict()}).keys()
        other = to_dense(sparse_net())
        nn.init.zeros_(other[0].weight)
        other.load_state_dict(loaded)
        assert untouched(other, dense.state_dict())


def test_sparse_layers_under_two_names_are_written_once(tmp_path):
    layer = SparseLinear(100, 100, nnz=1000)
    save_sparse(nn.Sequential(layer, layer), tmp_path / "file")
    loaded = load_sparse(tmp_path / "file")
    assert loaded["1.weight"] is loaded["0.weight"]
    assert torch.equal(loaded["0.weight"], layer.dense_weight())


def test_the_benchmark_measures_sparse_layers_beside_their_dense_twin(monkeypatch):
    net, x = sparse_net(), torch.randn(2, 3, 8, 8)
    table = benchmark(net, x, batch_sizes=(1, 3), rounds=2, memory=False)
    assert list(table.rows)[:4] == ["dense", "sparse layers", "compacted", "CSR"]
    assert {type(layer) for layer in net} >= {SparseLinear, SparseConv2d}
    monkeypatch.setattr(training, "DENSE_LIMIT", 1000)
    table = benchmark(net, x, batch_sizes=(1,), rounds=2)
    assert list(table.rows) == ["sparse layers", "CSR"]
    assert all(row.memory_bytes is not None for row in table.rows.values())
    assert table.skipped["compacted"].startswith("compact needs dense weights")
    assert table.skipped["ONNX"].startswith("to_onnx needs dense weights")
    assert "Smallest file: CSR" in str(table)
    assert "better than sparse layers." in str(table)


# ---------------------------------------------------------------------- files


def bits(x):
    return x.contiguous().view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_files_bring_back_every_bit(tmp_path, dtype, density):
    state = {
        "a.weight": (torch.randn(60, 70) * 9 * (torch.rand(60, 70) < density)).abs().to(dtype),
        "a.bias": torch.zeros(3).to(dtype),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    if dtype.is_floating_point:
        state["a.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -1e-7]).to(dtype)
    save_sparse(state, tmp_path / "net.safetensors")
    loaded = load_sparse(tmp_path / "net.safetensors")
    assert loaded.keys() == state.keys()
    for name, x in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (x.dtype, x.shape)
        assert torch.equal(bits(loaded[name]), bits(x))


def test_the_size_of_a_file_is_in_proportion_to_the_nonzeros(tmp_path):
    def size(count):
        weight = torch.zeros(1000, 1000)
        weight.view(-1)[torch.randperm(10**6)[:count]] = 1.5
        save_sparse({"weight": weight}, tmp_path / "file")
        return os.path.getsize(tmp_path / "file")

    empty = size(0)
    assert empty < 1000
    assert [size(count) - empty for count in (1000, 20_000, 400_000)] == pytest.approx([8e3, 160e3, 3.2e6], abs=100)
    assert size(600_000) == pytest.approx(4e6, abs=1000), "dense, where that is smaller"


def test_negative_zeros_take_no_room_and_become_zeros(tmp_path):
    save_sparse({"weight": -torch.zeros(100, 100)}, tmp_path / "file")
    assert not torch.signbit(load_sparse(tmp_path / "file")["weight"]).any()
    assert os.path.getsize(tmp_path / "file") < 1000


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    net[1].weight = net[0].weight
    save_sparse(net, tmp_path / "file")
    assert os.path.getsize(tmp_path / "file") < 1.5 * net[0].weight.nbytes
    loaded = load_sparse(tmp_path / "file")
    assert loaded["1.weight"] is loaded["0.weight"]
    net.load_state_dict(loaded)


def test_a_module_comes_back_from_its_file(tmp_path):
    net, other = prune(nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50)), outputs=0.9), None
    net = net.to(memory_format=torch.channels_last)
    save_sparse(net, tmp_path / "file")
    other = nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50)).eval()
    other.load_state_dict(load_sparse(tmp_path / "file"))
    assert untouched(other, net.state_dict())


def test_files_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"'epoch' is of type int.*checkpoint\['state_dict'\]"):
        save_sparse({"epoch": 3}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"a tensor of layout torch\.sparse_coo"):
        save_sparse({"x": torch.zeros(3).to_sparse()}, tmp_path / "file")
    with pytest.raises(ValueError, match="names in state must not collide"):
        save_sparse({"x.values": torch.ones(2), "x": torch.zeros(1000)}, tmp_path / "file")
    pytest.importorskip("safetensors.torch").save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must be a file of save_sparse, got '.*other': its format is None"):
        load_sparse(tmp_path / "other")


def test_loading_says_what_a_wrong_file_is_and_what_reads_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"path must be a file that exists, got '.*nowhere'. Give one that save_"
    ):
        load_sparse(tmp_path / "nowhere")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"got '.*last.ckpt': it is not a safetensors .* read by lightning_sparse.load"
    ):
        load_sparse(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="path must be the path of a file, got one of type dict"):
        load_sparse({})
    with pytest.raises(ValueError, match="state must be a state dict or a module, got one of type list"):
        save_sparse([torch.ones(2)], tmp_path / "file")


@pytest.mark.parametrize(
    "export",
    [
        lambda module, path: compact(module, torch.ones(2, 3)),
        lambda module, path: to_csr(module),
        lambda module, path: to_onnx(module, path, torch.ones(2, 3)),
        lambda module, path: to_semi_structured(module),
        lambda module, path: benchmark(module, torch.ones(2, 3)),
    ],
)
@pytest.mark.parametrize("module", [{"state_dict": {}}, "last.ckpt"])
def test_exports_refuse_what_is_no_module(export, module, tmp_path):
    with pytest.raises(
        ValueError, match=r"module must be an nn.Module, got one of type (dict|str)\. .*load_from_check"
    ):
        export(module, tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "export",
    [
        lambda example, path: compact(nn.Linear(3, 2), example),
        lambda example, path: to_onnx(nn.Linear(3, 2), path, example),
        lambda example, path: benchmark(nn.Linear(3, 2), example),
    ],
)
def test_exports_refuse_what_is_no_example_of_an_input(export, tmp_path):
    for wrong in (None, [torch.ones(2, 3)], "net.onnx"):
        with pytest.raises(
            ValueError, match=rf"example_input must be a tensor, .* type {type(wrong).__name__}\. Give a"
        ):
            export(wrong, tmp_path / "net.onnx")


def test_some_exports_take_tensors_alone_and_onnx_a_folder_that_exists(tmp_path):
    for export in (
        lambda x: to_onnx(nn.Linear(3, 2), tmp_path / "net.onnx", x),
        lambda x: benchmark(nn.Linear(3, 2), x),
    ):
        with pytest.raises(ValueError, match=r"example_input must be a tensor, or a tuple of tensors, .* int, str"):
            export((torch.ones(2, 3), 1, "mean"))
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got '.*net\.onnx'\. Make"):
        to_onnx(nn.Linear(3, 2), tmp_path / "nowhere" / "net.onnx", torch.ones(2, 3))


# ---------------------------------------------------------------------- ONNX


def test_onnx_takes_any_batch_size_and_computes_the_same(tmp_path):
    net = prune(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    )
    x = torch.randn(1, 3, 6, 6)
    small, _ = compact(net, x)
    to_onnx(small, tmp_path / "net.onnx", x)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "net.onnx")
    batch = torch.randn(7, 3, 6, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(batch), atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


class Unfaithful:
    """A session that gives something else than the module."""

    def get_inputs(self):
        return [type("Slot", (), {"name": "x"})]

    def run(self, names, given):
        return [2 * next(iter(given.values()))]


def test_onnx_that_computes_something_else_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_sparse.export.onnx.onnx_session", lambda path: Unfaithful())
    with pytest.raises(RuntimeError, match=r"net.onnx in onnxruntime differs from the module by"):
        to_onnx(nn.Sequential(nn.ReLU()), tmp_path / "net.onnx", torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- 2:4


def test_the_pattern_is_at_most_two_nonzeros_in_every_four_neighbours():
    weight = two_of_four(32, 64)
    assert fits_2_4(weight)
    assert fits_2_4(torch.zeros(3, 8))
    weight[5, 8:12] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert not fits_2_4(weight)
    assert not fits_2_4(torch.tensor([[0.0, 1, 1, 1, 1, 0, 0, 0]])), "groups of four do not overlap"
    assert not fits_2_4(torch.zeros(3, 6)), "six is not a multiple of four"


def test_semi_structured_refuses_other_patterns_and_sizes():
    with pytest.raises(ValueError, match="None of the 1 Linear layers has the 2:4 pattern"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 32)))
    small = nn.Linear(8, 4)
    small.weight.data = two_of_four(4, 8)
    with pytest.raises(ValueError, match="out a multiple of 32, in of 64"):
        to_semi_structured(small)


def test_semi_structured_refuses_to_work_without_cuda(monkeypatch):
    linear = nn.Linear(64, 32)
    linear.weight.data = two_of_four(32, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        to_semi_structured(linear)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32 on cpu. Call module.cuda\(\).half\(\)"):
        to_semi_structured(nn.Sequential(linear))


# ---------------------------------------------------------------------- benchmark


def test_the_benchmark_measures_all_variants_and_leaves_the_module_alone():
    net = sparse_mlp().train()
    with torch.no_grad():
        net[0].weight[10:] = 0
    before = copy.deepcopy(net.state_dict())
    table = benchmark(net, torch.randn(2, 40), batch_sizes=(1, 3), rounds=2, memory=False)
    assert list(table.rows) == ["dense", "compacted", "CSR", "ONNX", "compacted, ONNX"]
    assert all(ms > 0 for row in table.rows.values() for ms in row.milliseconds.values())
    assert table.rows["compacted"].file_bytes < table.rows["dense"].file_bytes
    assert table.sparse_file_bytes is not None
    assert "no layer has a sparsity" in table.skipped["compacted, CSR"]
    assert untouched(net, before)
    assert net.training


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_benchmark_shows_progress_on_a_terminal_alone(stream, monkeypatch):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(measuring, "to_onnx", lambda *args: 1 / 0)
    monkeypatch.setattr(measuring, "_peak", lambda *args: None)
    benchmark(nn.Linear(3, 2), torch.ones(2, 3), batch_sizes=(1, 4), rounds=1)
    shown = [title for title in ("exports:", "batch 1:", "batch 4:", "memory:") if title in err.getvalue()]
    assert shown == (["exports:", "batch 1:", "batch 4:", "memory:"] if stream is Terminal else [])
    assert stream is Terminal or not err.getvalue()


def test_the_table_says_which_one_pays():
    rows = {"dense": Measurement({1: 2.0}, 4 << 20, 64 << 20), "CSR": Measurement({1: 0.5}, 1 << 20, 80 << 20)}
    text = str(Benchmark(rows, {"ONNX": "onnx is not installed"}, 1 << 19))
    assert text.splitlines()[:4] == [
        "|  | batch 1 (ms) | file (MiB) | peak memory added (MiB) |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 2.000 | 4.00 | 64.0 |",
        "| CSR | 0.500 | 1.00 | 80.0 |",
    ]
    assert "Fastest at batch 1: CSR, 4.00 times better than dense." in text
    assert "Least memory: dense.\n" in text
    assert "save_sparse writes them: 0.50 MiB" in text
    assert "Not measured: ONNX: onnx is not installed" in text


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    torch.save((torch.randn(4, 2048),), tmp_path / "inputs")
    dense = nn.Sequential(nn.Linear(2048, 4096))  # 32 MiB
    added = measuring._peak("dense", {"dense": dense}, tmp_path, {})
    assert 30 << 20 < added < 90 << 20


class Local(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_memory_that_cannot_be_measured_is_left_out_with_the_reason(tmp_path, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nAttributeError: no such class")

    monkeypatch.setattr(subprocess, "run", fail)
    skipped = {}
    assert measuring._peak("dense", {"dense": Local()}, tmp_path, skipped) is None
    assert skipped == {"memory of dense": "AttributeError: no such class"}


def test_the_benchmark_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="rounds and batch_sizes must be at least 1, got rounds=0"):
        benchmark(nn.Linear(2, 2), torch.ones(1, 2), rounds=0)
    with pytest.raises(ValueError, match="one device, the CPU or a CUDA GPU, got tensors on cpu, meta"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"got tensors on meta. Give module.to\(device\)"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.ones(1, 2, device="meta"))
