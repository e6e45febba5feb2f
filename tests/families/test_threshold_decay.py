"""threshold_weight_decay: thresholds decay as they would in a param group of their own."""

import warnings

import pytest
import torch
from helpers import THRESHOLDS, Lit, Scaler, Unmixed, fit, loader, mlp, same, saved, seeded, state, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference_training import check, double, train, train_reference
from torch.optim.lr_scheduler import StepLR

OWN, THEIRS = 0.05, 1e-2
OPTIMIZERS = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=THEIRS, **kw),
    "maximizing SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=THEIRS, maximize=True),
    "Adam": lambda p, **kw: torch.optim.Adam(p, lr=3e-3, weight_decay=THEIRS, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=3e-3, weight_decay=THEIRS, **kw),
    "decoupled NAdam": lambda p: torch.optim.NAdam(p, 3e-3, weight_decay=THEIRS, decoupled_weight_decay=True),
}


class Scheduled(Lit):
    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": StepLR(optimizer, 7, 0.5), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return -loss if self.optimizers().param_groups[0].get("maximize") else loss


def in_two_groups(make):
    def groups(reference):
        thresholds = [*reference.t.values(), *(reference.t_b.values() if reference.method == "DFBST" else ())]
        others = [p for p in reference.trained() if all(p is not t for t in thresholds)]
        return make([{"params": others}, {"params": thresholds, "weight_decay": OWN}])

    return groups


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds_decay_as_in_a_group_of_their_own(method, optimizer):
    make = OPTIMIZERS[optimizer]
    clip = lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.5)  # noqa: E731
    loss = lambda call, x, y: torch.nn.functional.cross_entropy(call(x), y)  # noqa: E731
    if optimizer.startswith("maximizing"):
        if method in ("DST", "DFBST"):
            pytest.skip("the penalty would be maximized, too")
        loss = lambda call, x, y: -torch.nn.functional.cross_entropy(call(x), y)  # noqa: E731
    reference = train_reference(method, in_two_groups(make), loss, clip, lambda o: StepLR(o, 7, 0.5))
    callback = THRESHOLDS[method](threshold_weight_decay=OWN)
    module = seeded(lambda: Scheduled(double(), optimizer=make))
    train(callback, module, gradient_clip_val=0.5)
    check(callback, reference)
    alone = THRESHOLDS[method]()
    train(alone, seeded(lambda: Scheduled(double(), optimizer=make)), gradient_clip_val=0.5)
    assert not same(alone.thresholds, callback.thresholds), "the decay of the group would do as well"


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_the_decay_of_the_group_is_the_same_bit_for_bit_when_named(method, optimizer):
    results = []
    for options in ({}, {"threshold_weight_decay": THEIRS}):
        callback = THRESHOLDS[method](**options)
        fit(callback, seeded(lambda: Lit(optimizer=OPTIMIZERS[optimizer])), max_epochs=1)
        results.append(state(callback))
    assert same(*results)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_loss_scale_changes_nothing_also_where_a_fused_optimizer_takes_it_away(optimizer):
    results = []
    for fused in (False, True):
        callback = THRESHOLDS["STR"](threshold_weight_decay=OWN)
        make = lambda p, fused=fused: OPTIMIZERS[optimizer](p, fused=fused)  # noqa: E731
        plugins = [Unmixed(Scaler())] if fused else []
        fit(callback, seeded(lambda m=make: Lit(double(), m)), loader(dtype=torch.float64), plugins=plugins)
        results.append(callback.thresholds)
    plain, scaled = results
    assert all(torch.allclose(t, scaled[name], rtol=1e-6, atol=1e-9) for name, t in plain.items())


class Overflows(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 3 else 1)


@pytest.mark.parametrize("fused", [False, True])
def test_thresholds_do_not_decay_in_a_step_that_amp_skips(fused):
    callback, seen = THRESHOLDS["STR"](threshold_weight_decay=OWN), []

    class Looks(Overflows):
        def on_train_batch_end(self, *args):
            seen.append({name: t.clone() for name, t in callback.thresholds.items()})

    module = seeded(lambda: Looks(optimizer=lambda p: OPTIMIZERS["AdamW"](p, fused=fused)))
    fit(callback, module, loader(48), plugins=[Unmixed(Scaler())], max_epochs=1)
    assert same(seen[3], seen[2])
    assert not same(seen[4], seen[3])


def test_a_run_is_resumed_bit_for_bit(tmp_path):
    whole = THRESHOLDS["DFBST"](threshold_weight_decay=OWN)
    one, _ = fit(whole)
    _, run = fit(THRESHOLDS["DFBST"](threshold_weight_decay=OWN), max_epochs=1)
    saved(run, tmp_path / "half.ckpt")
    resumed = THRESHOLDS["DFBST"](threshold_weight_decay=OWN)
    two = seeded(Lit, 9)
    trainer(resumed).fit(two, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(state(whole), state(resumed))
    assert same(one.state_dict(), two.state_dict())


def test_an_optimizer_of_unknown_decay_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    with pytest.raises(MisconfigurationException, match=r"decay of their own under Own, .* leave threshold_weight_dec"):
        fit(THRESHOLDS["STR"](threshold_weight_decay=OWN), Lit(optimizer=Own))


@pytest.mark.parametrize("method", ["STR", "AutoSparse"])
@pytest.mark.parametrize(
    ("theirs", "own", "warns"), [(0, None, 1), (0, 0.1, 0), (0.1, 0, 1), (0.1, None, 0), (0, 0, 1)]
)
def test_what_drives_thresholds_is_missed_where_nothing_does(method, theirs, own, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = THRESHOLDS[method](threshold_weight_decay=own)
        fit(callback, Lit(mlp(), lambda p: torch.optim.SGD(p, 0.1, weight_decay=theirs)), loader(8), max_epochs=1)
    assert sum("its thresholds have no weight decay" in str(warning.message) for warning in caught) == warns


def test_a_negative_decay_is_refused():
    with pytest.raises(ValueError, match="threshold_weight_decay must be a finite number of at least 0, got -1"):
        THRESHOLDS["STR"](threshold_weight_decay=-1)
