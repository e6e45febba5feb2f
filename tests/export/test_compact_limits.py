"""Compaction: what stays, with its reason, and what is refused."""

import copy
import io
import pickle

import lightning.pytorch as pl
import pytest
import torch
from exported import Model, directly, same_results, sizes, untouched
from helpers import SETTINGS, Lit, effective, fit, mlp, prune, seeded
from torch import nn
from torch.nn import functional

from lightning_sparse.export import (
    CSRLinear,
    compact,
    load_sparse,
    save_sparse,
    to_csr,
    to_onnx,
)
from lightning_sparse.storage import SparseConv2d
from lightning_sparse.storage import sparse as training

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


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


# ---------------------------------------------------------------------- compact: what stays


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
    plain, _ = compact(net, torch.randn(2, 12), select=False)
    assert b"lightning_sparse" not in pickle.dumps(plain), "it needs this package to be loaded"


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
    module, _ = fit(callback, seeded(lambda: Lit(network())), max_epochs=2)
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


class StepsOnly(pl.LightningModule):
    """Has a network, and no forward of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)


@pytest.mark.parametrize("export", [compact, lambda module, x: to_onnx(module, "unwritten.onnx", x)])
def test_a_module_without_forward_is_refused_with_a_remedy(export):
    with pytest.raises(ValueError, match=r"StepsOnly has no forward, .* such as module\.net, or define forward"):
        export(StepsOnly(), torch.randn(2, 3))


def test_a_module_that_cannot_be_traced_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"(?s)torch.fx cannot trace Model.*module.backbone = compact"):
        compact(Model(branches, a=nn.Linear(3, 3)), torch.randn(2, 3))


def test_a_random_module_is_refused():
    net = Model(lambda m, x: functional.dropout(m.a(x), 0.5, True), a=nn.Linear(30, 30))
    with pytest.raises(RuntimeError, match=r"differs from the module by .* If the module is random"):
        compact(net, torch.randn(2, 30))
