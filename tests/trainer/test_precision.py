"""Reduced precision: bf16, fp16 with a gradient scaler (also one that skips steps), double."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LATENT,
    REPRESENTATIVES,
    SETTINGS,
    THRESHOLDS,
    Lit,
    Scaler,
    Unmixed,
    effective,
    fit,
    loader,
    mlp,
    same,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.plugins import MixedPrecision

DTYPES = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


class Overflows(Lit):
    """The loss of some batches is not finite."""

    bad = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.bad else loss


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        *itertools.product(SETTINGS, ["bf16-mixed", "bf16-true"]),
        *((method, "64-true") for method in REPRESENTATIVES),  # in which references are compared, of every method
    ],
)
def test_trains_sparse_in_this_precision(method, precision):
    callback = SETTINGS[method]()
    module, _ = fit(callback, train=loader(dtype=DTYPES[precision]), precision=precision)
    assert module.net[0].weight.dtype == DTYPES[precision]
    if method in LATENT:
        assert callback.latents["net.0.weight"].dtype == DTYPES[precision]
    if method in THRESHOLDS:
        widest = torch.promote_types(DTYPES[precision], torch.float32)
        assert {t.dtype for t in callback.thresholds.values()} == {widest}, "small steps would be lost"
    assert 0.02 < callback.sparsity < 0.98
    assert effective(module, callback)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds_come_out_near_those_of_single_precision(method, precision):
    exact, rough = SETTINGS[method](), SETTINGS[method]()
    fit(exact, max_epochs=1)
    fit(rough, train=loader(dtype=DTYPES[precision]), precision=precision, max_epochs=1)
    assert rough.sparsity == pytest.approx(exact.sparsity, abs=0.1)
    for name, t in exact.thresholds.items():
        assert (rough.thresholds[name] - t).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("method", "accumulate"),
    [*((method, 4) for method in SETTINGS), *((method, 1) for method in REPRESENTATIVES)],
)
def test_scaling_changes_nothing(method, accumulate):
    """A power of two scales exactly, so weights, masks and thresholds are the same to the last bit."""
    plain, scaled = SETTINGS[method](), SETTINGS[method]()
    one, _ = fit(plain, accumulate_grad_batches=accumulate)
    scaler = Scaler()
    two, _ = fit(scaled, accumulate_grad_batches=accumulate, plugins=[Unmixed(scaler)])
    assert scaler.skipped == 0
    assert scaler.get_scale() == 1024
    assert plain.sparsity > 0.02
    assert same(state(plain), state(scaled))
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize(("kind", "scaled"), [("SGD", False), ("SGD", True), ("Adam", True)])
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_fused_optimizers_agree_with_unfused_ones_also_where_they_unscale_gradients_themselves(method, kind, scaled):
    def optimizer(fused):
        if kind == "SGD":
            return lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=fused)
        return lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3, fused=fused)

    results = []
    for fused in (False, True):
        callback = SETTINGS[method]()
        plugins = [Unmixed(Scaler())] if scaled and fused else []
        module = seeded(lambda f=fused: Lit(mlp(torch.float64), optimizer=optimizer(f)))
        fit(callback, module, loader(dtype=torch.float64), plugins=plugins, max_epochs=1)
        results.append({**state(callback), **module.state_dict()})
    plain, other = results
    assert plain.keys() == other.keys()
    for name, x in plain.items():
        assert torch.allclose(x.double(), other[name].double(), rtol=1e-6, atol=1e-8), name
    assert callback.sparsity > 0.02


class Looks(pl.Callback):
    """Keep the state after each batch."""

    def __init__(self, callback):
        self.callback, self.states, self.effective = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        trained = {"parameters": pl_module.state_dict(), "thresholds": getattr(self.callback, "thresholds", {})}
        self.states.append(copy.deepcopy({"masks": self.callback.masks, **trained}))
        self.effective.append(effective(pl_module, self.callback))


@pytest.mark.parametrize(
    ("method", "fused"), [*((method, False) for method in SETTINGS), *((method, True) for method in REPRESENTATIVES)]
)
@pytest.mark.filterwarnings("error:.*not finite")
def test_a_step_that_amp_skips_changes_nothing_and_leaves_effective_weights(method, fused):
    class Bad(Overflows):
        bad = (9, 10, 20)

    callback = SETTINGS[method]()
    looks, scaler = Looks(callback), Scaler()
    module = seeded(
        lambda: Bad(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=fused, weight_decay=1e-3))
    )
    fit([callback, looks], module, plugins=[Unmixed(scaler)], max_epochs=1)
    assert scaler.skipped == (0 if fused else 3)  # a fused optimizer skips within its own step
    assert scaler.get_scale() == 1024 / 8
    assert all(looks.effective)
    for i in range(1, 30):
        assert same(looks.states[i], looks.states[i - 1]) == (i in Bad.bad)
        for t in looks.states[i]["thresholds"].values():
            assert torch.isfinite(t).all()
    assert callback.sparsity > 0.02


def test_half_precision_with_a_scaler_that_overflows_at_first(method):
    """Real fp16 on the CPU, from a scale that is far too large."""
    callback = SETTINGS[method]()
    scaler = Scaler(2.0**24)
    looks = Looks(callback)
    module, _ = fit([callback, looks], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.skipped > 0
    assert scaler.get_scale() < 2.0**24
    assert all(looks.effective)
    assert 0.02 < callback.sparsity < 0.98
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_half_precision_resumes_with_its_scale(method, tmp_path):
    results = []
    for whole in (True, False):
        callback = SETTINGS[method]()
        scaler = Scaler(2.0**20)
        if whole:
            _, run = fit(callback, max_epochs=1, plugins=[Unmixed(scaler)])
            run.save_checkpoint(tmp_path / "last.ckpt")
            scale = scaler.get_scale()
            continue
        run = trainer(callback, max_epochs=2, plugins=[Unmixed(scaler)])
        run.fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")
        results.append(callback.sparsity)
        assert scaler.get_scale() == scale
    assert results[0] > 0.02
