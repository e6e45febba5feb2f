"""Bad input: every error names the argument, the rule, the value and the remedy. Never silently dense."""

import subprocess
import sys

import pytest
import torch
from helpers import SETTINGS, Lit, data, fit, loader, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DFBST, DST, STR, AutoSparse

BAD = [
    (lambda: DST(alpha=-1), "alpha must be a finite number of at least 0, got -1. Try alpha=5e-4"),
    (lambda: DST(alpha=float("nan")), "alpha must be a finite number of at least 0, got nan"),
    (lambda: DST(alpha=float("inf")), "alpha must be a finite number of at least 0, got inf"),
    (lambda: DST(alpha="much"), "alpha must be a finite number of at least 0, got 'much'"),
    (lambda: DST(alpha=True), "alpha must be a finite number of at least 0, got True"),
    (lambda: DST(1e-3, granularity="row"), "granularity must be one of .*'layer', 'neuron', 'weight'.*, got 'row'"),
    (lambda: DST(1e-3, reset_above=1.5), "reset_above must be a number from 0 to 1, got 1.5"),
    (lambda: DST(1e-3, include="net.*"), "include must be a list of glob patterns .*, got 'net"),
    (lambda: DST(1e-3, exclude=[3]), "exclude must be a list of glob patterns .*, got"),
    (lambda: DST(1e-3, log_every_n_steps=0), "log_every_n_steps must be an integer of at least 1, got 0"),
    (lambda: DFBST(alpha=-1e-9, beta=0), "alpha must be a finite number of at least 0, got -1e-09"),
    (lambda: DFBST(alpha=0, beta=-0.1), "beta must be a finite number of at least 0, got -0.1. Try beta=0.01"),
    (lambda: DFBST(alpha=0, beta=float("inf")), "beta must be a finite number of at least 0, got inf"),
    (lambda: DFBST(0, 0, penalty_from_epoch=-1), "penalty_from_epoch must be an integer of at least 0, got -1"),
    (lambda: DFBST(0, 0, reset_above=-1), "reset_above must be a number from 0 to 1, got -1"),
    (lambda: AutoSparse(alpha=1.1), "alpha must be a number from 0 to 1, got 1.1"),
    (lambda: AutoSparse(decay="cosin"), "decay must be one of .*'cosine'.*, got 'cosin'"),
    (lambda: AutoSparse(decay_rate=-1), "decay_rate must be a finite number of at least 0, got -1"),
    (lambda: AutoSparse(alpha_zero_epoch=2.5), "alpha_zero_epoch must be an integer of at least 0, got 2.5"),
    (lambda: AutoSparse(backward_density=50), "backward_density must be a number from 0 to 1, got 50"),
    (lambda: AutoSparse(init_threshold=float("nan")), "init_threshold must be a finite number"),
    (lambda: STR(init_threshold=float("-inf")), "init_threshold must be a finite number"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_a_bad_argument_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", SETTINGS)
def test_reading_before_any_fit_is_an_error_and_not_a_number(method):
    with pytest.raises(RuntimeError, match=f"{method} has no weights yet: they are chosen when trainer.fit starts"):
        _ = SETTINGS[method]().sparsity


@pytest.mark.parametrize("method", SETTINGS)
def test_a_module_with_nothing_to_make_sparse_is_refused(method):
    module = Lit(nn.Sequential(nn.BatchNorm1d(12), nn.Flatten(), nn.AdaptiveAvgPool1d(4)))
    with pytest.raises(MisconfigurationException, match=rf"(?s){method} found nothing to make sparse.*include"):
        fit(SETTINGS[method](), module=module)
    frozen = Lit()
    frozen.net.requires_grad_(False)
    frozen.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(MisconfigurationException, match=r"(?s)found nothing to make sparse.*frozen"):
        fit(SETTINGS[method](), module=frozen)


def test_weights_that_no_optimizer_owns_are_refused():
    module = Lit(optimizer=lambda p: torch.optim.SGD([q for q in p if q.ndim < 2], lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"no optimizer owns any of the chosen weights \(net.0.weight"):
        fit(SETTINGS["DST"](), module=module)


def test_a_weight_in_two_optimizers_is_refused():
    class Twice(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.net[0].parameters(), 0.1)

    module = Twice()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"net.0.weight is in 2 optimizers or param groups"):
        fit(SETTINGS["DST"](), module=module)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=r"\['\*.haed.weight'\] match none.*net.0.weight"):
        fit(SETTINGS["DST"](**{argument: ["*.haed.weight"]}))
    with pytest.raises(ValueError, match=r"\['\*.bias'\] match none. Biases and norms are never made sparse"):
        fit(SETTINGS["DST"](**{argument: ["*.bias"]}))


def test_lbfgs_is_refused():
    module = Lit(optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(MisconfigurationException, match="DST cannot train with LBFGS"):
        fit(SETTINGS["DST"](), module=module)


def test_a_strategy_that_splits_weights_is_refused():
    from lightning.pytorch.strategies import FSDPStrategy

    callback = SETTINGS["DST"]()
    run = trainer(callback)
    run.strategy.__class__ = type("FSDPStrategy", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy may split them. Use a single device or"):
        callback._check(run)


def test_finetuning_callbacks_are_refused_with_the_way_out():
    from lightning.pytorch.callbacks import BackboneFinetuning

    module = Lit()
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match=r"BaseFinetuning cannot handle.*add_param_group"):
        fit([SETTINGS["DST"](), BackboneFinetuning()], module=module)


@pytest.mark.parametrize("method", ["AutoSparse", "STR"])
def test_without_weight_decay_soft_thresholds_warn(method, recwarn):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, 0.1)))
    with pytest.warns(UserWarning, match=f"{method} has no regulariser of its own, .*Set weight_decay"):
        fit(SETTINGS[method](), module=module, max_epochs=1)
    recwarn.clear()
    fit(SETTINGS[method](), max_epochs=1)
    assert not [w for w in recwarn if "regulariser" in str(w.message)]


def test_an_annealing_without_an_end_is_refused_and_one_without_need_of_it_is_not():
    with pytest.raises(MisconfigurationException, match="decay='sigmoid_cosine' needs the number of epochs"):
        fit(SETTINGS["AutoSparse"](), max_epochs=-1, max_time={"seconds": 1})
    callback = SETTINGS["AutoSparse"](decay="linear")
    fit(callback, max_epochs=-1, max_steps=90)  # 30 a epoch: 3 epochs
    assert callback.current_alpha == pytest.approx(0.6 * (1 - 2 / 3))
    fit(SETTINGS["AutoSparse"](decay="exponential"), max_epochs=-1, max_steps=3)


@pytest.mark.parametrize("method", SETTINGS)
def test_gradients_that_are_not_finite_leave_thresholds_unharmed_and_warn_once(method):
    class Broken(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx % 7 == 3 else loss

    callback = SETTINGS[method]()
    with pytest.warns(UserWarning, match="Gradients were not finite: thresholds took no step") as warned:
        module, _ = fit(callback, module=seeded(Broken))
    assert sum("not finite" in str(w.message) for w in warned) == 1
    assert all(t.isfinite().all() for t in callback.thresholds.values())
    if method == "DFBST":
        assert all(t.isfinite().all() for t in callback.backward_thresholds.values())
    assert module.net[0].weight.isnan().any(), "weights that are not numbers must be seen, as in any run"


def test_a_layer_that_collapses_is_named_once_whether_the_guard_catches_it_or_not():
    with pytest.warns(UserWarning, match="collapsed") as warned:
        fit(DST(alpha=10.0), max_epochs=3)
    messages = [str(w.message) for w in warned]
    assert sum("net.0.weight collapsed: over 99% of it was masked" in message for message in messages) == 1

    callback = DST(alpha=10.0, reset_above=None)
    with pytest.warns(UserWarning, match="no weight left") as warned:
        fit(callback, max_epochs=3)
    messages = [str(w.message) for w in warned]
    assert callback.density == 0
    assert sum("net.0.weight has no weight left: density 0 after epoch" in message for message in messages) == 1


OTHER_PACKAGE = """
import warnings; warnings.simplefilter("ignore")
import torch, {first}
from lightning_sparse import DST
import {trainer} as pl

class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def training_step(self, batch, i):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

callback = DST(alpha=1e-2)
run = pl.Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
                 enable_progress_bar=False, accelerator="cpu")
run.fit(Tiny(), torch.utils.data.DataLoader(torch.randn(64, 4), 2))
print("density", callback.density)
"""


@pytest.mark.parametrize(
    ("first", "package", "mixed"),
    [
        ("pytorch_lightning", "pytorch_lightning", False),
        ("lightning", "lightning.pytorch", False),
        ("lightning", "pytorch_lightning", True),
    ],
)
def test_either_lightning_package_works_and_a_mixture_is_named(first, package, mixed):
    pytest.importorskip("pytorch_lightning")
    program = OTHER_PACKAGE.format(first=first, trainer=package)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    if mixed:
        assert done.returncode != 0
        assert "DST is a callback of 'lightning.pytorch', but the Trainer comes from 'pytorch_lightning'" in done.stderr
        assert "LIGHTNING_SPARSE_BACKEND=pytorch_lightning" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "density" in done.stdout


def test_resuming_with_other_weights_names_them(tmp_path):
    _, run = fit(SETTINGS["DST"]())
    run.save_checkpoint(tmp_path / "a.ckpt")
    module = seeded(Lit)
    module.net[2].weight.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"differ in \['net.2.weight'\]: choose the same weights"):
        trainer(SETTINGS["DST"](), max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="written with granularity='neuron', this DST has 'layer'"):
        trainer(SETTINGS["DST"](granularity="layer"), max_epochs=4).fit(
            seeded(Lit), loader(), ckpt_path=tmp_path / "a.ckpt"
        )


def test_an_error_within_training_leaves_exact_zeros_behind():
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if self.global_step == 40:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    callback, module = SETTINGS["DST"](), seeded(Fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callback, module=module, train=DataLoader(TensorDataset(*data()), batch_size=8))
    assert callback.sparsity > 0
    assert all(torch.equal(mask, module.get_parameter(name) != 0) for name, mask in callback.masks.items())
