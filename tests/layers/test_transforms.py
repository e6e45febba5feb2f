"""Weights that are changed before their layer computes with them."""

import pytest
import torch
from helpers import Lit, fit, loader, seeded
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from lightning_sparse import RandomPruning
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules.matrices import FIRST, Outputs


class Of(nn.Module):
    """A parametrization by a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, W):
        return self.function(W)


class LowRank(nn.Module):
    """``W + B A``."""

    def __init__(self, out, inputs):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(1, inputs)), nn.Parameter(torch.randn(out, 1))

    def forward(self, W):
        return W + self.B @ self.A


class Product(nn.Module):
    """A weight of two factors."""

    def forward(self, a, b):
        return a @ b

    def right_inverse(self, W):
        return W[:, :1].clone(), W[:1].clone()


class Standardised(nn.Conv2d):
    """Weight standardisation in a forward of its own."""

    def forward(self, x):
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, W / W.std((1, 2, 3), keepdim=True), self.bias)


class Cosine(nn.Linear):
    """Rows and inputs of norm 1; the norm of a row is never 0."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class Divided(nn.Linear):
    """Rows are divided by what may be 0."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Counting(nn.Linear):
    """Code with effects of its own, and the weight as it is."""

    calls = 0

    def forward(self, x):
        Counting.calls += 1
        self.seen = len(x)
        return super().forward(nn.functional.dropout(x, 0.5))


class Broken(nn.Linear):
    """Takes more than one argument."""

    def forward(self, x, y):
        return super().forward(x + y)


def by(function):
    layer = nn.Linear(6, 4)
    register_parametrization(layer, "weight", Of(function))
    return layer


def choice(layer, **kwargs):
    (found,) = [c for c in select_parameters(layer, **kwargs) if c.is_weight]
    return found


KEPT = {  # layer, rows that must not be empty
    "plain": (lambda: nn.Linear(6, 4), None),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), FIRST),
    "weight_norm of columns": (lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=1), Outputs(1)),
    "weight_norm of all": (lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None), None),
    "weight_norm of a transposed convolution": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 2)),
        FIRST,
    ),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 4)), FIRST),
    "old weight_norm of columns": (lambda: nn.utils.weight_norm(nn.Linear(6, 4), dim=1), Outputs(1)),
    "old weight_norm of all": (lambda: nn.utils.weight_norm(nn.Linear(6, 4), dim=None), None),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 4)), None),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 4)), None),
    "scaled": (lambda: by(lambda W: 2 * W), None),
    "rows divided by their norms": (lambda: by(lambda W: W / W.norm(dim=1, keepdim=True)), FIRST),
    "columns divided by their norms": (lambda: by(lambda W: W / W.norm(dim=0, keepdim=True)), Outputs(1)),
    "rows divided by what is never 0": (lambda: by(nn.functional.normalize), None),
    "cosine": (lambda: Cosine(6, 4), None),
    "divided in forward": (lambda: Divided(6, 4), FIRST),
    "code of its own": (lambda: Counting(6, 4), None),
    "code that cannot be tried": (lambda: Broken(6, 4), None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", KEPT)
def test_a_weight_whose_zeros_survive_is_chosen(kind):
    build, nonempty = KEPT[kind]
    found = choice(seeded(build), include=["*"])
    assert found.reason is None
    assert found.nonempty == nonempty
    if "transposed" not in kind:
        assert choice(seeded(build)).reason is None, "also by default"


LOST = {
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 4)), "_Orthogonal"),
    "centred": (lambda: by(lambda W: W - W.mean(1, keepdim=True)), "Of"),
    "columns centred": (lambda: by(lambda W: W - W.mean(0)), "Of"),
    "softmax": (lambda: by(lambda W: W.softmax(1)), "Of"),
    "added to": (lambda: low_rank(), "LowRank"),
    "norms of rows and columns": (
        lambda: by(lambda W: W / W.norm(dim=1, keepdim=True) / W.norm(dim=0)),
        "Of divides it by norms along several dimensions",
    ),
    "standardised": (lambda: Standardised(3, 4, 2), "Standardised"),
    "timm": (lambda: of_timm(nn.Conv2d)(3, 4, 2), "ScaledStdConv2d"),
}


def low_rank():
    layer = nn.Linear(6, 4)
    register_parametrization(layer, "weight", LowRank(4, 6))
    layer.parametrizations.weight[0].requires_grad_(False)
    return layer


def of_timm(base):
    return type("ScaledStdConv2d", (base,), {"__module__": "timm.layers.std_conv"})


@pytest.mark.parametrize("kind", LOST)
def test_a_weight_whose_zeros_are_lost_stays_dense_and_says_why(kind):
    build, reason = LOST[kind]
    layer = seeded(build)
    for patterns in (None, ["*"]):
        choices = select_parameters(nn.ModuleList([layer, nn.Linear(2, 2)]), include=patterns)
        (found,) = [c for c in choices if c.name.endswith(("weight", "original")) and c.name.startswith("0.")]
        assert reason in found.reason
    with pytest.raises(ValueError, match=rf"match none.*cannot be: {reason}"):
        select_parameters(nn.ModuleList([layer, nn.Linear(2, 2)]), include=[found.name])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_gains_are_never_chosen(norm):
    net = nn.Sequential(norm(nn.Linear(6, 4)), norm(nn.LSTM(6, 4), "weight_hh_l0"))
    names = {c.name for c in select_parameters(net, include=["*"]) if c.reason is None}
    gains = [name for name, p in net.named_parameters() if p.ndim == 2 and 1 in p.shape]
    assert len(gains) == 2
    assert len(names) == 3
    assert not names & set(gains)
    with pytest.raises(ValueError, match=r"match none\. .*Biases, norms and gains are never made sparse"):
        select_parameters(net, include=[gains[0]])


def test_gains_of_other_layers_and_factors_are_never_chosen():
    scaled = Cosine(6, 4)
    scaled.gain = nn.Parameter(torch.ones(4, 1))
    made = nn.Linear(6, 4)
    register_parametrization(made, "weight", Product(), unsafe=True)
    names = {c.name for c in select_parameters(nn.ModuleList([scaled, made]), include=["*"]) if c.reason is None}
    assert names == {"0.weight"}


def test_trying_a_layer_leaves_it_and_the_random_numbers_alone():
    layer = seeded(lambda: Counting(6, 4))
    before, number = layer.weight.detach().clone(), torch.get_rng_state()
    assert choice(layer).reason is None
    assert Counting.calls > 0
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.get_rng_state(), number)
    assert layer.training
    assert not hasattr(layer, "seen")


def test_power_iterations_do_not_take_place_when_a_parametrization_is_tried():
    layer = seeded(lambda: parametrizations.spectral_norm(nn.Linear(6, 4)))
    register_parametrization(layer, "weight", Of(lambda W: 2 * W))
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    assert choice(layer).reason is None
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_a_standardised_network_is_not_called_sparse():
    net = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), Standardised(3, 8, 2), nn.Flatten(), nn.Linear(8, 4))
    module, _ = fit(RandomPruning(0.8), seeded(lambda: Lit(net)), loader(64), max_epochs=1)
    assert module.net[1].weight.all()


def test_convolutions_of_timm_stay_dense():
    timm = pytest.importorskip("timm.layers")
    for kind in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"):
        choices = select_parameters(nn.ModuleList([getattr(timm, kind)(3, 4, 2), nn.Linear(2, 2)]), include=["*"])
        assert [c.name for c in choices if c.reason is None] == ["1.weight"]
