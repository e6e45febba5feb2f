"""What MemoryEfficientDST's heuristics read off: GraBo's activations and gradients, SynFlow's products."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from helpers import Lit, cnn, fit, loader, mlp, seeded, trainer
from torch import nn

from lightning_sparse import MemoryEfficientDST
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.layers.unit_activity import Activity, GradientSketch, SynapticFlow, readable


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 3, 4))[0][:, -1])


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def spy(callback):
    """Record what ``callback`` takes for f and g at each update."""
    found, endpoints = [], callback._subsets.endpoints

    def recorded(weights):
        found.append(endpoints(weights))
        return found[-1]

    callback._subsets.endpoints = recorded
    return found


def normalized(x):
    return (x / x.sum()).double()


# ---------------------------------------------------------------------- GraEst


SKETCHED = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "tokens": (lambda: nn.Linear(3, 2), (2, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 2, stride=2, groups=2), (2, 2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, padding=1, dilation=2, bias=False), (1, 2, 2, 2)),
    "conv2d same": (lambda: nn.Conv2d(1, 2, 2, padding="same"), (1, 1, 2, 2)),
    "one image": (lambda: nn.Conv2d(2, 2, (1, 2), padding_mode="circular", padding=(0, 1)), (2, 1, 2)),
    "conv3d": (lambda: nn.Conv3d(1, 2, (2, 1, 1)), (2, 1, 2, 1, 1)),
}


@pytest.mark.parametrize("name", SKETCHED)
def test_the_product_of_graests_sums_is_the_gradient_on_average_over_all_signs(name, monkeypatch):
    """And for a single sample and place, where signs cancel, it is the gradient itself."""
    build, shape = SKETCHED[name]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    output = layer(x)
    places = output.numel() // layer.weight.shape[0]
    assert places <= 8, "2^8 passes at most"
    target = torch.randn_like(output)
    (expected,) = torch.autograd.grad((output * target).sum(), layer.weight)
    total = 0.0
    for pattern in itertools.product((-1.0, 1.0), repeat=places):
        signs = torch.tensor(pattern, dtype=torch.float64)
        monkeypatch.setattr(GradientSketch, "_signs", lambda self, shape, like, r=signs: r.view(*shape))
        sketch = GradientSketch({"w": layer}, seed=0)
        (layer(x) * target).sum().backward()
        f, g = sketch.sums()["w"]
        groups = len(f) // layer.weight[0].numel()
        f, g = f.view(groups, 1, -1), g.view(groups, -1, 1)
        total = total + (g * f).view_as(expected)
        sketch.close()
    assert torch.allclose(total / 2**places, expected)


def test_graests_signs_are_random_of_the_callbacks_generator_which_stays_where_it_is():
    callbacks = [MemoryEfficientDST(0.5, heuristic="graest", update_every=4, stop_at=1.0, seed=s) for s in (1, 1, 2)]
    found = [spy(callback) for callback in callbacks]
    for callback in callbacks:
        fit(callback, seeded(lambda: Lit(cnn())), loader(80))
    first, again, other = ([ends["net.1.weight"] for ends in updates] for updates in found)
    assert all(torch.equal(a["f"], b["f"]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a["f"], b["f"]) for a, b in zip(first, other, strict=True))
    assert all(ends["f"].sum() == pytest.approx(1) for ends in first)
    signs = GradientSketch({}, 3)._signs((4000,), torch.zeros(1))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum()) < 5 * 4000**0.5


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("accumulate", [1, 3])
def test_grabo_sums_the_magnitudes_of_activations_and_their_gradients_over_the_step(accumulate):
    """And validation in between does not count."""
    callback = MemoryEfficientDST(0.5, update_every=4, stop_at=1.0)
    found = spy(callback)
    inputs, outputs = {}, {}

    class Records(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4 and not inputs:
                for name, layer in self.net.named_children():
                    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                        layer.register_forward_hook(record(f"net.{name}.weight"))
            return super().training_step(batch, batch_idx)

    def record(name):
        def hook(layer, args, output):
            inputs.setdefault(name, []).append(args[0].detach())
            output.register_hook(outputs.setdefault(name, []).append)

        return hook

    class Stops(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for m in pl_module.modules():
                m._forward_hooks.clear()

    module = seeded(lambda: Records(cnn()))
    run = trainer(
        [callback, Stops()], max_epochs=1, accumulate_grad_batches=accumulate, val_check_interval=accumulate * 4
    )
    run.fit(module, loader(), loader(16))
    assert len(found) == (30 // accumulate - 1) // 4
    first = found[0]
    assert first.keys() == callback.masks.keys() == inputs.keys()
    for name, ends in first.items():
        channels = 1 if module.get_parameter(name).ndim > 2 else -1
        for key, tensors in (("f", inputs[name]), ("g", outputs[name])):
            assert len(tensors) == accumulate
            sums = sum(x.abs().transpose(0, channels).flatten(1).sum(1) for x in tensors)
            assert torch.allclose(ends[key], normalized(sums), atol=1e-6), (name, key)
    assert first["net.1.weight"]["groups"] == 2


def product(weights):
    """1 W_1 ... W_k for each k, over matrices ``(out, in)``."""
    flow = [torch.ones(weights[0].shape[1], dtype=torch.float64)]
    for W in weights:
        flow.append(W.abs().double() @ flow[-1])
    return flow


def test_synflow_is_the_product_of_magnitudes_on_either_side():
    net = mlp()
    layers = [net[0], net[2], net[4]]
    flow = SynapticFlow(net, ["0.weight", "2.weight", "4.weight"])
    net(torch.randn(5, 12))
    sums = flow.sums()
    into = product([layer.weight for layer in layers])
    from_ = product([layer.weight.T for layer in reversed(layers)])[::-1]
    for (f, g), a, b in zip(sums.values(), into[:-1], from_[1:], strict=True):
        assert f.dtype == torch.float64
        assert torch.allclose(f / 5, a)
        assert torch.allclose(g / 5, b)
    assert set(flow.calls.values()) == {1}


def test_synflow_survives_depth_that_single_precision_does_not():
    net = nn.Sequential(*[nn.Linear(50, 50) for _ in range(60)])
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(20)
    flow = SynapticFlow(net, [f"{i}.weight" for i in range(60)])
    net(torch.randn(2, 50))
    f, g = flow.sums()["30.weight"]
    assert f.isfinite().all()
    assert g.isfinite().all()
    assert f.max() > 3e38


def test_synflow_of_convolutions_adds_up_over_space():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
    flow = SynapticFlow(net, ["0.weight", "3.weight"])
    net(torch.randn(1, 4, 5))
    (f, g), (f2, g2) = flow.sums().values()
    assert f.tolist() == [5] * 4
    assert torch.allclose(g, net[3].weight.abs().double().sum(0).view(6, 5).sum(1))
    ones = torch.ones(1, 4, 5, dtype=torch.float64)
    through = nn.functional.conv1d(ones, net[0].weight.abs().double(), padding=1, groups=2)
    assert torch.allclose(f2, through.flatten())
    assert g2.tolist() == [1, 1]


class Stateful(nn.Module):
    """With everything that could leave a trace: dropout, running statistics, norms, noise, recurrence, attention."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.norm, self.rnn = nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True)
        self.attention, self.b = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)
        self.drop.eval()

    def forward(self, x, scale=1.0):
        x = self.norm(self.drop(self.bn(self.a(x)).relu())) + 0.01 * torch.rand(8)
        x, _ = self.rnn(x.unsqueeze(1) * scale)
        return {"logits": self.b(self.attention(x, x, x)[0][:, 0]), "extra": [x, None]}


def test_synflow_leaves_no_trace():
    net = seeded(Stateful)
    names = [choice.name for choice in select_parameters(net) if choice.reason is None]
    flow = SynapticFlow(net, names)
    net(torch.randn(6, 12), scale=torch.tensor(2.0))["logits"].sum().backward()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    rng, default = torch.get_rng_state(), torch.get_default_dtype()
    with torch.no_grad():
        sums = flow.sums()
    assert sums.keys() == {"a.weight", "b.weight", "attention.out_proj.weight"}
    assert flow.calls == {"a.weight": 1, "b.weight": 1, "attention.out_proj.weight": 0}
    assert all(sums[name][end].min() > 0 for name in ("a.weight", "b.weight") for end in (0, 1))
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in net.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in net.named_parameters() if name in gradients)
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert default == torch.get_default_dtype()
    assert not hooks(net)


def test_norms_bend_no_flow():
    """Batch-norm scales by its learned factor and running variance; norms of the input itself are passed over."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0]))
        net[1].running_mean.fill_(100)
        net[1].running_var.copy_(torch.tensor([1.0, 4.0, 9.0, 1.0]))
        net[1].bias.fill_(7)
    net.train()
    flow = SynapticFlow(net, ["0.weight", "3.weight"])
    net(torch.randn(2, 3))
    (_, g), (f, _) = flow.sums().values()
    factor = net[1].weight.abs().double() / net[1].running_var.double().sqrt()  # after the call: momentum moved it
    assert torch.allclose(f / 2, net[0].weight.abs().double().sum(1) * factor, rtol=1e-4)
    assert torch.allclose(g / 2, net[3].weight.abs().double().sum(0) * factor, rtol=1e-4)


@pytest.mark.parametrize("heuristic", ["grabo", "synflow"])
def test_weights_whose_units_cannot_be_told_are_sampled_uniformly_and_named(heuristic):
    callback = MemoryEfficientDST(0.8, heuristic=heuristic, update_every=4)
    found = spy(callback)
    with pytest.warns(UserWarning, match=r"draws the endpoints of some weights uniformly.*'net.rnn.weight_ih_l0'"):
        fit(callback, seeded(lambda: Lit(LSTM())))
    assert found[0].keys() == {"net.head.weight"}
    grown = {name for name, mask in callback.masks.items() if mask.any()}
    assert "net.rnn.weight_hh_l0" in grown


class Functional(Lit):
    """Never calls its layers as modules."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.net:
            x = nn.functional.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return nn.functional.cross_entropy(x, y)


@pytest.mark.parametrize("heuristic", ["grabo", "synflow"])
def test_layers_that_are_not_called_are_sampled_uniformly_and_named(heuristic):
    callback = MemoryEfficientDST(0.8, heuristic=heuristic, update_every=4)
    found = spy(callback)
    with pytest.warns(UserWarning, match=r"draws the endpoints.*'net.0.weight', 'net.2.weight', 'net.4.weight'"):
        fit(callback, seeded(Functional))
    ends = found[0]["net.0.weight"]
    assert torch.equal(ends["f"], torch.full((12,), 1 / 12, dtype=torch.float64))
    assert torch.equal(ends["g"], torch.full((16,), 1 / 16, dtype=torch.float64))


def test_tied_weights_and_others_are_not_readable():
    net = nn.Module()
    net.a, net.b, net.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    net.b.weight = net.a.weight
    net.d, net.e, net.f = nn.Bilinear(2, 2, 2), nn.Conv3d(1, 1, 1), nn.Embedding(3, 3)
    names = [name for name, p in net.named_parameters() if p.ndim > 1]
    assert readable(net, names).keys() == {"c.weight", "e.weight"}


def test_a_closed_or_copied_watch_counts_nothing():
    net = mlp()
    activity = Activity(readable(net, ["0.weight"]))
    other = copy.deepcopy(net)
    other(torch.ones(1, 12)).sum().backward()
    y = net(torch.ones(1, 12)).sum()
    activity.close()
    y.backward()
    f, g = activity.sums()["0.weight"]
    assert f.tolist() == [1] * 12
    assert not g.any()


def test_several_optimizer_steps_in_a_batch_each_see_their_own():
    """Updates that fall due in the middle of a batch are watched, too."""

    class Thrice(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(3):
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

    callback = MemoryEfficientDST(0.8, update_every=5, stop_at=1.0)
    found = spy(callback)
    module = seeded(Thrice)
    fit(callback, module, max_steps=30, max_epochs=-1)
    assert len(found) == 5
    assert all(ends.keys() == callback.masks.keys() for ends in found)
    assert not hooks(module)
