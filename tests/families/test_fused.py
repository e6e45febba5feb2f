"""Weights that are computed with at once, as on a GPU, train as those that are one by one, in few operations."""

import copy

import pytest
import torch
from helpers import LATENT, MASKED, N_OF_M, SavesFirst, cnn, effective, fit, loader, mlp, saved, seeded, state, trainer
from helpers import Lit as Module
from torch import nn

from lightning_sparse import DST, STR, AutoSparse
from lightning_sparse.bench import launches

pytest.importorskip("lightning_sparse.kernels.thresholds_fused", exc_type=ImportError)
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def transposed():
    """A weight that can lie among others, and one whose rows do not follow each other in memory."""
    rows = nn.Linear(12, 8), nn.ReLU(), nn.Unflatten(1, (8, 1))
    return nn.Sequential(*rows, nn.ConvTranspose1d(8, 4, 1), nn.Flatten())


NETWORKS = {"cnn": cnn, "transposed": transposed}


def trained(kernels, method, network, dtype=torch.float64, monkeypatch=None, **options):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", kernels)
    callback = {**LATENT, **N_OF_M}[method](**options)
    module = seeded(lambda: Module(NETWORKS[network]().to(dtype), lambda p: torch.optim.SGD(p, **SGD)))
    precision = "64-true" if dtype == torch.float64 else "32-true"
    fit(callback, module, loader(dtype=dtype), max_epochs=1, max_steps=6, precision=precision)
    return callback, module


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in LATENT),
        ("SRSTE", {"pattern": "1:2"}),
        ("DFBST", {"granularity": "layer"}),
        ("DST", {"granularity": "weight"}),
        ("DST", {"alpha": None, "sparsity": 0.8}),
        ("STR", {"sparsity": 0.8}),
    ],
    ids=str,
)
def test_training_is_that_of_one_weight_at_a_time(method, options, network, monkeypatch):
    ours, module = trained("fused", method, network, monkeypatch=monkeypatch, **options)
    theirs, expected = trained("torch", method, network, monkeypatch=monkeypatch, **options)
    assert effective(module, ours)
    for name, mask in theirs.masks.items():
        assert torch.equal(ours.masks[name], mask)
    # sums of rows are added up in another order, and the scalars of kernels are float32
    for x, y in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)
    for name, latent in theirs.latents.items():
        torch.testing.assert_close(ours.latents[name], latent, rtol=1e-7, atol=1e-8)
    if method == "DFBST":
        assert all(torch.equal(mask, theirs.backward_masks[name]) for name, mask in ours.backward_masks.items())


@pytest.mark.parametrize("method", ["DFBST", "AutoSparse", "TopKAST"])
def test_a_resumed_run_equals_the_uninterrupted_one(method, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fused")
    whole, resumed = LATENT[method](), LATENT[method]()
    _, run = fit([whole, SavesFirst(tmp_path / "middle.ckpt")], seeded(Module), loader(40), max_epochs=2)
    want = saved(run, tmp_path / "whole.ckpt")
    run = trainer(resumed, max_epochs=2)
    run.fit(seeded(Module, 5), loader(40), ckpt_path=tmp_path / "middle.ckpt")
    have = saved(run, tmp_path / "resumed.ckpt")
    assert all(torch.equal(x, have["state_dict"][name]) for name, x in want["state_dict"].items())
    assert repr(state(whole)) == repr(state(resumed))


@pytest.mark.parametrize("method", ["DFBST", "TopKAST"])
def test_a_step_without_the_gradient_of_some_weights_leaves_them(method, monkeypatch):
    class Half(Module):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self.half = batch_idx % 2 == 1
            out = self.net[0](x) if self.half else self.net(x)
            return nn.functional.cross_entropy(out[:, :4], y)

    def train(kernels):
        monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", kernels)
        callback = LATENT[method]()
        batches = loader(40, dtype=torch.float64)
        module, _ = fit(callback, seeded(lambda: Half(mlp().double())), batches, precision="64-true")
        return callback, module

    (ours, module), (_, expected) = train("fused"), train("torch")
    assert effective(module, ours)
    for x, y in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_latents_after_the_fit_have_memory_of_their_own_and_copies_train(monkeypatch):
    callback, _ = trained("fused", "DFBST", "cnn", monkeypatch=monkeypatch)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in callback.latents.values())
    fit(copy.deepcopy(callback), seeded(Module), loader(24), max_epochs=1)


def test_collapsed_layers_are_reset(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fused")
    callback = LATENT["DST"](alpha=5.0)
    with pytest.warns(UserWarning, match="collapsed"):
        fit(callback, seeded(Module), max_epochs=1)
    assert callback.density > 0.01


def test_a_method_that_overrides_a_function_gets_matrices(monkeypatch):
    class Own(DST):
        def gradients(self, weight, dP, W):
            assert dP.ndim == 2
            super().gradients(weight, dP, W)

    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fused")
    assert DST.joins
    assert STR.joins
    assert not Own.joins
    assert not AutoSparse(backward_density=0.5).joins
    fit(Own(alpha=5e-3), seeded(Module), loader(24), max_epochs=1)


COUNTED = [
    *(
        "set",
        "rigl",
        "srigl",
        "snfs",
        "dsr",
        "itop",
        "mest",
        "ggr",
        "memoryefficientdst",
        "cht",
        "granet",
        "gmp",
        "randompruning",
    ),
    *("fixedmask", "oneshot", "snip", "grasp", "synflow", "lotteryticket", "acdc"),
]


@pytest.mark.parametrize("method", COUNTED)
def test_a_method_with_masks_adds_eight_operations_at_most_whatever_the_number_of_layers(method, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fused")
    counts = [launches.added(method, depth) for depth in (2, 6)]
    assert counts == [8, 8] if method == "snfs" else counts == [5, 5]


@pytest.mark.parametrize(
    ("method", "most"),
    [("dst", 15), ("dfbst", 28), ("autosparse", 12), ("str", 12), ("topkast", 17)],
)
def test_a_method_with_latent_weights_adds_thirty_operations_at_most(method, most, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fused")
    counts = [launches.added(method, depth) for depth in (2, 6)]
    assert counts[0] == counts[1] <= most <= 30


def test_every_method_with_masks_is_counted():
    assert {name.lower() for name in MASKED} | {"lotteryticket", "acdc"} == {*COUNTED, "deepr"}
