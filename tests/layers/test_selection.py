"""Which weights train sparse, in every kind of layer, and that their gradients are the method's."""

import logging

import pytest
import torch
from helpers import HOOKED, SETTINGS, THRESHOLDS, Lit, effective, fit, loader, seeded, trainer
from reference import Reference
from torch import nn

from lightning_sparse import DST
from lightning_sparse.layers.selection import select_parameters, table


class Takes(nn.Module):
    """Brings rows of 12 numbers into the shape that ``layer`` takes, and its output to 4 classes."""

    def __init__(self, layer, shape, call=None):
        super().__init__()
        self.layer, self.shape = layer, shape
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x):
        y = self.call(self.layer, x.view(len(x), *self.shape))
        return y.flatten(1)[:, :4]


def first(layer, x):
    return layer(x)[0]


def attend(layer, x):
    return layer(x, x[..., : layer.kdim], x[..., : layer.vdim])[0]


# kind: layer, input shape, how it is called, the weights that train sparse, and their output neurons
KINDS = {
    "Linear": (lambda: nn.Linear(12, 6), (12,), None, {"weight": 6}),
    "Conv1d": (lambda: nn.Conv1d(3, 6, 2), (3, 4), None, {"weight": 6}),
    "Conv1d groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 3), None, {"weight": 6}),
    "Conv2d": (lambda: nn.Conv2d(3, 6, 2, padding=1), (3, 2, 2), None, {"weight": 6}),
    "Conv2d depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 2, 2), None, {"weight": 6}),
    "Conv3d": (lambda: nn.Conv3d(3, 6, (1, 2, 2)), (3, 1, 2, 2), None, {"weight": 6}),
    "Conv3d groups": (lambda: nn.Conv3d(2, 4, (1, 2, 3), groups=2), (2, 1, 2, 3), None, {"weight": 4}),
    "RNN": (lambda: nn.RNN(4, 5, batch_first=True), (3, 4), first, {"weight_ih_l0": 5, "weight_hh_l0": 5}),
    "GRU": (lambda: nn.GRU(4, 5, batch_first=True), (3, 4), first, {"weight_ih_l0": 15, "weight_hh_l0": 15}),
    "LSTM": (
        lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3, batch_first=True),
        (3, 4),
        first,
        {
            f"weight_{k}_l{i}{r}": n
            for k, n in (("ih", 20), ("hh", 20), ("hr", 3))
            for i in (0, 1)
            for r in ("", "_reverse")
        },
    ),
    "LSTMCell": (lambda: nn.LSTMCell(12, 5), (12,), first, {"weight_ih": 20, "weight_hh": 20}),
    "Bilinear": (lambda: nn.Bilinear(12, 12, 4), (12,), lambda layer, x: layer(x, x), {"weight": 4}),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        (3, 4),
        attend,
        {"in_proj_weight": 12, "out_proj.weight": 4},
    ),
    "MultiheadAttention q/k/v": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True),
        (3, 4),
        attend,
        {"q_proj_weight": 4, "k_proj_weight": 4, "v_proj_weight": 4, "out_proj.weight": 4},
    ),
}


# Where a layer's kind may matter: a way through the base classes each, and methods that look at layers or run them.
LOOKING = ("DFBST", "TopKAST", "RigL", "SNIP", "GraSP", "SynFlow", *HOOKED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", LOOKING)
def test_this_kind_of_layer_trains_sparse_by_default(method, kind):
    build, shape, call, weights = KINDS[kind]
    options = {"granularity": "neuron"} if method in THRESHOLDS else {}
    callback = SETTINGS[method](**options)
    module, _ = fit(callback, seeded(lambda: Lit(Takes(build(), shape, call))), loader(64))
    assert set(callback.masks) == {f"net.layer.{name}" for name in weights}
    if method in THRESHOLDS:
        assert {name: len(t) for name, t in callback.thresholds.items()} == {
            f"net.layer.{name}": neurons for name, neurons in weights.items()
        }
    for name, p in module.named_parameters():
        assert name in callback.masks or p.all() or method not in THRESHOLDS, "biases stay dense"
    assert callback.sparsity > 0
    assert effective(module, callback)


ON_REQUEST = {
    "Embedding": (lambda: nn.Embedding(9, 4), lambda layer, x: layer((x[:, :3] * 3).long().clamp(0, 8)), (12,), 9),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 2), None, (4, 3), 6),
    "ConvTranspose2d groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), None, (4, 3, 1), 6),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 5, 1), None, (3, 2, 2, 1), 5),
}


@pytest.mark.parametrize("kind", ON_REQUEST)
@pytest.mark.parametrize("method", LOOKING)
def test_this_kind_of_layer_trains_sparse_only_on_request(method, kind):
    build, call, shape, neurons = ON_REQUEST[kind]

    def net():
        return nn.Sequential(Takes(build(), shape, call), nn.Linear(4, 4))

    options = {"granularity": "neuron"} if method in THRESHOLDS else {}
    callback = SETTINGS[method](**options)
    fit(callback, seeded(lambda: Lit(net())), loader(64))
    assert set(callback.masks) == {"net.1.weight"}
    callback = SETTINGS[method](**options, include=["net.*"])
    module, _ = fit(callback, seeded(lambda: Lit(net())), loader(64))
    assert set(callback.masks) == {"net.0.layer.weight", "net.1.weight"}
    assert effective(module, callback)
    if method in THRESHOLDS:
        assert len(callback.thresholds["net.0.layer.weight"]) == neurons
        assert callback.layer_density["net.0.layer.weight"] < 1


def upside_down(W, groups):
    """A transposed convolution's weight with its outputs first, ``(groups * out, in / groups, ...)``."""
    return torch.cat([part.transpose(0, 1) for part in W.chunk(groups)])


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
@pytest.mark.parametrize("method", THRESHOLDS)
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "transposed groups", "plain"])
def test_gradients_are_the_references_whatever_the_layout(method, kind, granularity):
    """One step of SGD: what a neuron is, is defined by the reference, on a weight with its outputs first."""
    groups = 2 if "groups" in kind else 1
    torch.manual_seed(0)
    transposed = kind.startswith("transposed")
    build = (lambda: nn.ConvTranspose2d(4, 6, 2, groups=groups)) if transposed else (lambda: nn.Conv2d(3, 6, 2))
    layer = build().double()
    twin = nn.Module()
    turn = (lambda W: upside_down(W, groups)) if transposed else (lambda W: W)
    twin.weight = nn.Parameter(turn(layer.weight.detach()).clone())
    x = torch.randn(5, 4 if transposed else 3, 3, 3, dtype=torch.float64)
    target = torch.randn(5, 6, 4 if transposed else 2, 4 if transposed else 2, dtype=torch.float64)

    alpha = 0.3 if granularity == "layer" else 0.1
    options = {"DST": {"alpha": alpha}, "DFBST": {"alpha": alpha, "beta": 3.0}}.get(
        method, {"init_threshold": -2.0, **({"alpha": 0.6} if method == "AutoSparse" else {})}
    )
    reference = Reference(twin, ["weight"], method, granularity, **options)
    bias = layer.bias.detach().clone()

    def forward(W):
        if transposed:
            W = torch.cat([part.transpose(0, 1) for part in W.chunk(groups)])
            return nn.functional.conv_transpose2d(x, W, bias, groups=groups)
        return nn.functional.conv2d(x, W, bias)

    optimizer = torch.optim.SGD([reference.W["weight"], reference.t["weight"], reference.t_b["weight"]], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (forward(reference.effective("weight")) - target).square().mean()
        if method in ("DST", "DFBST"):
            loss = loss + options["alpha"] * torch.exp(-reference.t["weight"]).sum()
        loss.backward()
        reference.mask_gradients()
        optimizer.step()
        reference.guard()

    if kind == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    callback = SETTINGS[method](granularity=granularity, **options, include=["layer.weight"])
    module = Regression(layer, target)
    run = trainer(callback, max_epochs=3)
    if method == "AutoSparse":
        callback.decay = "none"
    run.fit(module, torch.utils.data.DataLoader(x, batch_size=5))
    same = turn(callback.latents["layer.weight"])
    assert torch.allclose(same, reference.W["weight"], rtol=1e-9, atol=1e-12)
    t = callback.thresholds["layer.weight"]
    assert torch.allclose(turn(t) if t.ndim > 1 else t, reference.t["weight"], rtol=1e-9, atol=1e-12)
    mask = reference.masks()["weight"]
    assert torch.equal(turn(callback.masks["layer.weight"]), mask)
    assert 0 < mask.double().mean() < 1
    if kind == "channels_last":
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert callback.latents["layer.weight"].stride() == layer.weight.stride()
    if method == "DFBST":
        t_b = callback.backward_thresholds["layer.weight"]
        assert torch.allclose(turn(t_b) if t_b.ndim > 1 else t_b, reference.t_b["weight"], rtol=1e-9, atol=1e-12)
        assert torch.equal(turn(callback.backward_masks["layer.weight"]), reference.M_b["weight"])


class Regression(Lit):
    """The weight alone is trained."""

    def __init__(self, layer, target):
        super().__init__(nn.Identity(), optimizer=lambda p: torch.optim.SGD([self.layer.weight], lr=0.3))
        self.layer, self.target = layer, target

    def training_step(self, x, batch_idx):
        return (self.layer(x) - self.target).square().mean()


def test_a_layout_that_changes_after_the_start_of_fit_harms_nothing():
    class Turns(Lit):
        def on_train_start(self):
            self.net.to(memory_format=torch.channels_last)

    def net():
        return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2), nn.Flatten())

    results = []
    for kind in (Lit, Turns):
        callback = SETTINGS["DST"]()
        module, _ = fit(callback, seeded(lambda k=kind: k(net())), max_epochs=1)
        assert torch.equal(module.net[1].weight != 0, callback.masks["net.1.weight"])
        results.append(callback.latents["net.1.weight"])
    assert torch.allclose(*results, atol=1e-5)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(x).relu()).relu())

    for method in SETTINGS.values():
        callback = method()
        module, run = fit(callback, seeded(lambda: Lit(Tied())))
        assert set(callback.masks) == {"net.a.weight", "net.out.weight"}
        assert module.net.b.weight is module.net.a.weight
        assert effective(module, callback)
        assert callback.density == sum(int(m.sum()) for m in callback.masks.values()) / (144 + 48)
        assert (
            sum(len(group["params"]) for group in run.optimizers[0].param_groups)
            == 5 + len(getattr(callback, "threshold_names", ())) * 2
        )


def test_tied_to_an_embedding_it_stays_dense_unless_asked_for():
    module = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "embedding": nn.Embedding(9, 4)})
    module["head"].weight = module["embedding"].weight
    (choice,) = select_parameters(module)
    assert choice.reason == "Embedding: only on request (include)"
    (choice,) = select_parameters(module, include=["embedding.weight"])  # by any of its names
    assert choice.reason is None
    assert "tied to embedding.weight" in choice.layer


def test_frozen_weights_are_left_alone():
    module = seeded(Lit)
    module.net[2].requires_grad_(False)
    before = module.net[2].weight.detach().clone()
    callback = SETTINGS["DST"]()
    fit(callback, module)
    assert set(callback.masks) == {"net.0.weight", "net.4.weight"}
    assert torch.equal(module.net[2].weight, before)


def test_include_and_exclude_choose_by_glob_patterns():
    def chosen(**kwargs):
        return [c.name for c in select_parameters(Lit(), **kwargs) if c.reason is None]

    assert chosen() == ["net.0.weight", "net.2.weight", "net.4.weight"]
    assert chosen(exclude=["*.4.weight"]) == ["net.0.weight", "net.2.weight"]
    assert chosen(include=["net.[02].*"]) == ["net.0.weight", "net.2.weight"]
    assert chosen(include=["net.*"], exclude=["net.0.*"]) == ["net.2.weight", "net.4.weight"]
    head = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    assert [c.name for c in select_parameters(head, exclude=["*.head.weight"]) if c.reason is None] == ["body.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["net.7.*", "net.0.bias", "weight"])
def test_a_pattern_that_matches_no_weight_is_an_error(argument, pattern):
    with pytest.raises(ValueError, match=rf"\['{pattern[:4]}.*match none. .* The weights are: \['net.0.weight'"):
        fit(DST(5e-4, **{argument: [pattern, "net.0.weight"]}))


def test_biases_and_norms_are_never_made_sparse_whatever_their_shape():
    net = nn.Sequential(
        nn.LayerNorm((3, 4)),
        nn.GroupNorm(1, 3),
        nn.BatchNorm1d(3),
        nn.RMSNorm((3, 4)),
        nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
    )
    names = {c.name for c in select_parameters(net, include=["*"]) if c.reason is None}
    assert names == {"4.in_proj_weight", "4.out_proj.weight"}
    assert {c.name for c in select_parameters(net) if c.reason is None} == names


def test_compiled_submodules_are_chosen_by_their_plain_names():
    net = nn.ModuleDict({"head": torch.compile(nn.Linear(2, 2)), "body": nn.Linear(2, 2)})
    assert [c.name for c in select_parameters(net, exclude=["head.weight"]) if c.reason is None] == ["body.weight"]


def test_the_table_says_what_is_sparse_what_is_not_and_why():
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "body": nn.Conv1d(4, 6, 3),
            "norm": nn.LayerNorm((3, 4)),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "head": nn.Linear(4, 2),
        }
    )
    lines = table("Title", select_parameters(net, exclude=["head.weight"])).splitlines()
    assert lines[0] == "Title"
    assert [line.split() for line in lines[1:2]] == [["weight", "layer", "shape", "training"]]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[3:]}
    assert rows["embedding.weight"] == "Embedding 9 x 4 dense (Embedding: only on request (include))"
    assert rows["body.weight"] == "Conv1d 6 x 4 x 3 sparse"
    assert rows["norm.weight"] == "LayerNorm 3 x 4 dense (bias, norm or scalar)"
    assert rows["frozen.weight"] == "Linear 4 x 4 dense (frozen)"
    assert rows["head.weight"] == "Linear 2 x 4 dense (excluded)"
    assert lines[-1] == "1 weights, 72 of 168 parameters (42.9%) train sparse"


def test_the_table_is_shown_once_at_the_start_of_fit(caplog):
    with caplog.at_level(logging.INFO):
        fit(SETTINGS["DST"](exclude=["net.4.weight"]), max_epochs=1)
    (message,) = [r.getMessage() for r in caplog.records if "lightning_sparse" in r.getMessage()]
    assert message.startswith("DST(alpha=0.005, exclude=['net.4.weight']) of lightning_sparse")
    assert "net.4.weight" in message
    assert "dense (excluded)" in message
