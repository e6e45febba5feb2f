"""Layers of any package: which are made sparse, and where their outputs lie."""

import logging
import math
import warnings

import pytest
import torch
from helpers import SETTINGS, THRESHOLDS, Lit, effective, fit, loader, saved, seeded, trainer
from torch import nn

from lightning_sparse import RandomPruning, RigL, register_layer
from lightning_sparse.layers import kinds
from lightning_sparse.layers.selection import patterns, select_parameters, table
from lightning_sparse.monitor.layer import layers_of, picture
from lightning_sparse.rules.matrices import FIRST, Outputs


@pytest.fixture(autouse=True)
def _forgets_what_a_test_registers(monkeypatch):
    monkeypatch.setattr(kinds, "LAYERS", dict(kinds.LAYERS))


class InOut(nn.Module):
    """A linear layer whose weight is ``(in, out)``."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """All experts read all: ``(experts, out, in)``, or inputs before outputs."""

    def __init__(self, experts, inputs, outputs, inputs_first=False):
        super().__init__()
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        self.inputs_first = inputs_first
        self.w = nn.Parameter(torch.randn(experts, *shape) / math.sqrt(inputs))

    def forward(self, x):
        return torch.einsum("bi,eio->beo" if self.inputs_first else "bi,eoi->beo", x, self.w).mean(1)


def named(cls, full_name):
    """A class of the same code under a package's name."""
    module, _, name = full_name.rpartition(".")
    return type(cls)(name, (cls,), {"__module__": module, "__qualname__": name})


def chosen(module, **kwargs):
    return {c.name: c for c in select_parameters(module, **kwargs) if c.reason is None}


# ---------------------------------------------------------------------- where the outputs lie


@pytest.mark.parametrize("method", THRESHOLDS)
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_a_layer_with_inputs_first_trains_as_its_transpose(method, granularity):
    register_layer(InOut, out_axis=1)

    def net(kind):
        torch.manual_seed(0)
        linear, turned = nn.Linear(12, 6), InOut(12, 6)
        turned.weight.data, turned.bias.data = linear.weight.data.T.contiguous(), linear.bias.data.clone()
        return nn.Sequential(linear if kind == "linear" else turned, nn.ReLU(), seeded(lambda: nn.Linear(6, 4)))

    found = {}
    for kind in ("linear", "turned"):
        callback = SETTINGS[method](granularity=granularity)
        module, _ = fit(callback, Lit(net(kind)), loader(96))
        W, t = callback.latents["net.0.weight"], callback.thresholds["net.0.weight"]
        assert effective(module, callback)
        assert 0 < callback.layer_density["net.0.weight"] < 1
        turn = kind == "turned"
        found[kind] = (W.T if turn else W, t.T if turn and t.ndim > 1 else t, callback.sparsity)
    for a, b in zip(found["linear"][:2], found["turned"][:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert found["linear"][2] == found["turned"][2]


def test_values_are_scaled_by_the_fan_in_of_the_outputs():
    register_layer(InOut, out_axis=1)
    module = seeded(lambda: Lit(InOut(12, 4), optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    dense = module.net.weight.detach().clone()
    callback = RandomPruning(0.6)
    fit(callback, module, max_steps=1)
    mask = callback.masks["net.weight"]
    factor = (12 / mask.sum(0).clamp(min=1)).sqrt()
    assert torch.allclose(module.net.weight, dense * mask * factor)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_experts_have_thresholds_for_each_neuron_and_one_share(inputs_first):
    register_layer(Experts, weights=["w"], out_axis=2 if inputs_first else 1, stacked=True)
    module = seeded(lambda: Lit(nn.Sequential(Experts(3, 12, 5, inputs_first), nn.Linear(5, 4))))
    callback = SETTINGS["DST"](granularity="neuron")
    fit(callback, module, loader(64))
    assert callback.thresholds["net.0.w"].shape == (15,)
    assert callback.layer_density["net.0.w"] < 1
    separate = nn.Sequential(*(nn.Linear(12, 5, bias=False) for _ in range(3)), nn.Linear(5, 4, bias=False))
    counts = []
    for net, share in ((module.net, [0]), (separate, [0, 1, 2])):
        callback = RandomPruning(0.6)
        run = seeded(lambda n=net: Lit(n))
        run.training_step = lambda batch, i, n=net: sum(p.square().sum() for p in n.parameters())
        fit(callback, run, max_steps=1)
        named_counts = list(callback.layer_count.values())
        counts.append((sum(named_counts[i] for i in share), sum(named_counts)))
    assert counts[0] == counts[1], "the experts share the budget as linear layers of their own do"


def test_looks_of_a_monitor_go_by_the_outputs():
    register_layer(InOut, out_axis=1)
    register_layer(Experts, weights=["w"], out_axis=1, stacked=True)
    net = nn.Sequential(InOut(4, 3), Experts(2, 3, 2))
    masks = {
        "0.weight": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]).bool(),
        "1.w": torch.tensor([[[1, 0, 0], [0, 0, 0]], [[1, 0, 1], [0, 1, 0]]]).bool(),
    }
    layers = {layer.name: layer for layer in layers_of(net, [])}
    assert (layers["0.weight"].neurons, layers["0.weight"].inputs) == (3, 4)
    assert (layers["1.w"].neurons, layers["1.w"].inputs) == (4, 6)
    look = picture(layers["0.weight"], masks["0.weight"])
    assert (look["empty_neurons"], look["empty_inputs"], look["shrunk_size"]) == (1, 1, 6)
    assert (look["rows"], look["columns"]) == (3, 4)
    look = picture(layers["1.w"], masks["1.w"])
    assert (look["empty_neurons"], look["empty_inputs"], look["shrunk_size"]) == (1, 2, 1 + 6)


def test_looks_of_a_monitor_go_by_the_outputs_of_weights_that_were_asked_for():
    net = seeded(lambda: nn.Sequential(nn.Unflatten(1, (4, 3)), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Flatten()))
    callback = RandomPruning(0.5, include=["*.weight"])
    module, _ = fit(callback, Lit(nn.Sequential(net, nn.Linear(24, 4))), max_steps=1)
    layer, _ = layers_of(module, [callback])
    assert (layer.neurons, layer.inputs, layer.groups) == (6, 4, 2)
    mask = torch.zeros(4, 3, 2, dtype=torch.bool)
    mask[0, 1], mask[3, 0] = True, True
    look = picture(layer, mask)
    assert (look["empty_neurons"], look["empty_inputs"], look["shrunk_size"]) == (4, 2, 4)


def test_a_batch_norm_counts_the_outputs_of_a_transposed_convolution():
    with torch.no_grad():
        net = seeded(lambda: nn.Sequential(nn.Unflatten(1, (2, 6)), nn.ConvTranspose1d(2, 5, 2), nn.BatchNorm1d(5)))
        for _ in range(12):
            net(torch.randn(8, 12))
    module = Lit(nn.Sequential(net, nn.Flatten(), nn.Linear(35, 4)))
    with pytest.warns(UserWarning, match="net.0.1.weight look trained"):
        fit(RandomPruning(0.5, include=["*.weight"], exclude=["net.2.*"]), module, max_steps=1)


def test_checkpoints_of_earlier_versions_resume(tmp_path):
    def lit():
        net = nn.Sequential(nn.Unflatten(1, (4, 3)), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Flatten())
        return seeded(lambda: Lit(nn.Sequential(net, nn.Linear(24, 4))))

    def callback():
        return SETTINGS["DFBST"](include=["*.weight"], granularity="neuron")

    _, run = fit(callback(), lit(), loader(64), max_epochs=1)
    checkpoint = saved(run, tmp_path / "new.ckpt")
    (state,) = checkpoint["callbacks"].values()
    for weight in state["weights"].values():
        outputs = Outputs(**weight.pop("outputs"))
        weight["transposed_groups"] = outputs.groups if outputs.axis else 0
    assert {weight["transposed_groups"] for weight in state["weights"].values()} == {0, 2}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    found = []
    for name in ("new", "old"):
        again = callback()
        module = lit()
        trainer(again, max_epochs=2).fit(module, loader(64), ckpt_path=tmp_path / f"{name}.ckpt")
        found.append([*module.state_dict().values(), *again.thresholds.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_thresholds_of_other_neurons_are_refused(tmp_path):
    def callback():
        return SETTINGS["DST"](include=["net.0.weight"], granularity="neuron")

    def lit():
        return seeded(lambda: Lit(nn.Sequential(InOut(12, 6), nn.Linear(6, 4))))

    _, run = fit(callback(), lit(), loader(64), max_epochs=1)
    saved(run, tmp_path / "rows.ckpt")
    register_layer(InOut, out_axis=1)
    with pytest.raises(Exception, match=r"thresholds of net.0.weight for neurons along dimension 0.*out_axis=0"):
        trainer(callback(), max_epochs=2).fit(lit(), loader(64), ckpt_path=tmp_path / "rows.ckpt")


# ---------------------------------------------------------------------- which layers are known


def test_registered_layers_are_chosen_and_their_subclasses_as_their_nearest_base():
    class Turned(nn.Linear):
        """Not what its base is."""

    class Both(Turned):
        pass

    register_layer(Turned, out_axis=1)
    net = nn.Sequential(Both(3, 4), nn.Linear(3, 4), InOut(3, 4))
    found = chosen(net)
    assert [found[name].outputs for name in ("0.weight", "1.weight")] == [Outputs(1), FIRST]
    assert "2.weight" not in found
    register_layer(InOut, out_axis=-1)
    assert chosen(net)["2.weight"].outputs == Outputs(1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layer": nn.Linear(2, 2)}, "layer must be a subclass of torch.nn.Module, got Linear"),
        ({"layer": int}, "layer must be a subclass of torch.nn.Module"),
        ({"weights": "weight"}, r'weights must be a list of names such as \["weight"\], got \'weight\''),
        ({"weights": []}, "weights must be a list of names"),
        ({"out_axis": 1.0}, "out_axis must be an integer, got 1.0"),
        ({"out_axis": True}, "out_axis must be an integer, got True"),
        ({"stacked": 1}, "stacked must be True or False, got 1"),
        ({"stacked": True}, "out_axis must not be 0 with stacked=True"),
    ],
)
def test_register_layer_refuses(arguments, match):
    given = {"layer": InOut, **arguments}
    with pytest.raises(ValueError, match=match):
        register_layer(given.pop("layer"), **given)


def test_an_axis_that_a_weight_does_not_have_is_an_error():
    register_layer(InOut, out_axis=2)
    with pytest.raises(ValueError, match=r"0.weight \(.*InOut\) must have the dimension out_axis=2 .* \(3, 4\)"):
        select_parameters(nn.Sequential(InOut(3, 4)))


class OfHub(nn.Module):
    """Marks and names of experts in transformers 5."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed, self.has_bias = is_transposed, True
        shape = (5, 6) if is_transposed else (6, 5)
        self.gate_up_proj, self.gate_up_proj_bias = (
            nn.Parameter(torch.randn(3, *shape)),
            nn.Parameter(torch.randn(3, 6)),
        )
        self.down_proj = nn.Parameter(torch.randn(3, *shape[::-1]))


def test_linear_maps_of_other_packages_are_chosen_without_them():
    conv1d = named(InOut, "transformers.pytorch_utils.Conv1D")
    linear = named(nn.Linear, "torch_geometric.nn.dense.linear.Linear")
    plain = type("Plain", (nn.Module,), {})
    lookalike = named(InOut, "mine.pytorch_utils.Conv1D")

    def relations(bases):
        layer = named(plain, "torch_geometric.nn.conv.rgcn_conv.RGCNConv")()
        layer.weight, layer.root = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(3, 4))
        layer.num_bases, layer.num_blocks = bases, None
        return layer

    net = nn.ModuleList(
        [conv1d(3, 4), linear(3, 4), OfHub(False), OfHub(True), relations(None), relations(2), lookalike(3, 4)]
    )
    assert {name: choice.outputs for name, choice in chosen(net).items()} == {
        "0.weight": Outputs(1),
        "1.weight": FIRST,
        "2.gate_up_proj": Outputs(1, 3, True),
        "2.down_proj": Outputs(1, 3, True),
        "3.gate_up_proj": Outputs(2, 3, True),
        "3.down_proj": Outputs(2, 3, True),
        "4.weight": Outputs(2, 2, True),
        "4.root": Outputs(1),
    }
    assert {"5.weight", "6.weight"} <= set(chosen(net, include=["*"]))
    assert not [name for name in chosen(net, include=["*"]) if name.endswith("bias")], "(experts, out) is a bias"


# ---------------------------------------------------------------------- mostly dense


def test_a_module_that_stays_mostly_dense_is_told_of_with_what_helps():
    net = nn.Sequential(
        Experts(3, 12, 5), nn.Linear(5, 4), InOut(4, 4), nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    )
    with pytest.warns(UserWarning, match=r"makes only 8.6% .* give include=\['net.\*.w") as found:
        fit(RigL(0.5, update_every=2), seeded(lambda: Lit(net)), loader(64))
    (message,) = [str(w.message) for w in found if "makes only" in str(w.message)]
    assert "cannot be made sparse: net.3.parametrizations.weight.original (_Orthogonal changes it" in message
    choices = select_parameters(Lit(net))
    assert set(chosen(Lit(net), include=patterns(choices))) == {"net.0.w", "net.1.weight", "net.2.weight"}


def test_a_choice_that_was_made_or_is_most_of_the_module_is_not_warned_of():
    def net():
        return nn.Sequential(Experts(3, 12, 5), nn.Linear(5, 4))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*makes only")
        fit(RandomPruning(0.5, include=["net.1.weight"]), seeded(lambda: Lit(net())), max_steps=1)
        fit(RandomPruning(0.5, exclude=["net.0.w"]), seeded(lambda: Lit(net())), max_steps=1)
        fit(RandomPruning(0.5), max_steps=1)
    with pytest.raises(Exception, match=r"found nothing to make sparse[\s\S]*include=\['net.w'\]"):
        fit(RandomPruning(0.5), seeded(lambda: Lit(Experts(3, 12, 4))), max_steps=1)


def test_patterns_stand_for_layers_and_match_nothing_else():
    net = nn.ModuleList([nn.ModuleDict({"a": InOut(2, 2), "b": nn.Linear(2, 2)}) for _ in range(3)])
    assert patterns(select_parameters(net)) == ["*.a.weight", "*.b.weight"]
    net[1]["b"] = nn.utils.parametrizations.orthogonal(net[1]["b"])
    net[1]["b"].weight = torch.eye(2)
    found = patterns(select_parameters(net))
    assert found == ["*.a.weight", "*.b.weight"]
    net[1]["a"].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    register_layer(InOut, out_axis=1)
    found = patterns(select_parameters(net))
    assert found == ["0.a.weight", "*.b.weight", "2.a.weight"], "1.a.weight is frozen"
    assert set(chosen(net, include=found)) == {"0.a.weight", "2.a.weight", "0.b.weight", "2.b.weight"}


def test_the_table_names_classes_in_full_and_the_sparsity_of_the_whole(caplog):
    net = nn.Sequential(nn.Linear(12, 4, bias=False), InOut(4, 4))
    lines = table("Title", select_parameters(net), {"0.weight": 0.25}).splitlines()
    rows = {line.split()[0]: line for line in lines[3:]}
    assert f"{__name__}.InOut  4 x 4" in rows["1.weight"]
    assert rows["1.weight"].endswith(f"dense ({__name__}.InOut: only on request (include))")
    assert rows["0.weight"].split()[1] == "Linear"
    assert lines[-1] == f"sparsity 0.75 of these weights, {36 / 68:.4g} of the whole module"
    with caplog.at_level(logging.INFO):
        fit(RandomPruning(0.5, include=["net.0.weight"]), seeded(lambda: Lit(net)), max_steps=1)
    assert any("of the whole module" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------------- the packages themselves


def test_gpt2_is_mostly_chosen():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    found = chosen(transformers.GPT2LMHeadModel(config))
    assert {choice.outputs for choice in found.values()} == {Outputs(1)}
    assert len(found) == 4


def test_experts_of_transformers_are_chosen():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    small = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    for kind, axis in (("Mixtral", 1), ("GptOss", 2)):
        config = getattr(transformers, f"{kind}Config")(**small, **heads)
        found = chosen(getattr(transformers, f"{kind}ForCausalLM")(config))
        experts = [choice.outputs for name, choice in found.items() if "experts" in name]
        assert experts == [Outputs(axis, 3, True)] * 2


def test_layers_of_torch_geometric_are_chosen():
    graph = pytest.importorskip("torch_geometric.nn")
    net = nn.ModuleList([graph.GCNConv(3, 4), graph.RGCNConv(3, 4, 2), graph.RGCNConv(3, 4, 2, num_bases=2)])
    assert {name: choice.outputs for name, choice in chosen(net).items()} == {
        "0.lin.weight": FIRST,
        "1.weight": Outputs(2, 2, True),
        "1.root": Outputs(1),
    }
