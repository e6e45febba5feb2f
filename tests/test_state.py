"""The callback's own state: a second fit, pickle and copy, several methods on one Trainer."""

import copy
import pickle

import pytest
import torch
from helpers import SETTINGS, Lit, fit, loader, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_second_fit_goes_on_from_latents_and_thresholds(method, recwarn):
    callback = SETTINGS[method]()
    module, _ = fit(callback)
    latents = {name: W.clone() for name, W in callback.latents.items()}
    thresholds = {name: t.clone() for name, t in callback.thresholds.items()}
    seen = {}

    from lightning.pytorch import Callback

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["latents"] = {name: W.clone() for name, W in callback.latents.items()}
            seen["thresholds"] = {name: t.clone() for name, t in callback.thresholds.items()}

    fit([callback, Spy()], module=module)
    assert same(seen["latents"], latents)
    assert same(seen["thresholds"], thresholds)
    assert not same(callback.latents, latents)
    assert not [w for w in recwarn if "afresh" in str(w.message)]


@pytest.mark.parametrize("method", SETTINGS)
def test_with_another_module_it_starts_afresh_and_says_so(method):
    used = SETTINGS[method]()
    fit(used, module=seeded(Lit, 1))
    with pytest.warns(UserWarning, match=f"This {method} holds the state of an earlier fit .* starts afresh"):
        module, _ = fit(used, module=seeded(Lit, 2))
    fresh = SETTINGS[method]()
    other, _ = fit(fresh, module=seeded(Lit, 2))
    assert same(used.latents, fresh.latents)
    assert same(module.state_dict(), other.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("method", SETTINGS)
def test_copies_before_and_after_fit_are_whole_and_independent(method, duplicate):
    callback = SETTINGS[method]()
    early = duplicate(callback)
    module, _ = fit(callback)
    twin, _ = fit(early)
    assert same(callback.latents, early.latents)
    assert same(module.state_dict(), twin.state_dict())

    late = duplicate(callback)
    assert same(late.masks, callback.masks)
    assert late.sparsity == callback.sparsity
    assert len(pickle.dumps(callback)) < 40_000, "the module or the Trainer went with it"
    fit(late, module=copy.deepcopy(module))
    assert same(callback.masks, {name: module.get_parameter(name) != 0 for name in callback.masks})


def test_copies_during_fit_leave_module_and_trainer_behind():
    from lightning.pytorch import Callback

    callback, copies = SETTINGS["DFBST"](), []

    class Copier(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            copies.append(pickle.dumps(callback))
            assert same(pickle.loads(copies[-1]).masks, callback.masks)

    fit([callback, Copier()])
    assert len(copies) == 2
    assert max(map(len, copies)) < 40_000


def test_methods_that_claim_the_same_weights_are_refused_by_name():
    callbacks = [SETTINGS["DST"](), SETTINGS["STR"](include=["net.2.*"])]
    with pytest.raises(MisconfigurationException, match=r"DST and STR both claim \['net.2.weight'\]"):
        fit(callbacks)


@pytest.mark.parametrize("second", ["DST", "AutoSparse"])
def test_methods_that_divide_the_weights_work_side_by_side_and_resume(second, tmp_path):
    def pair():
        return [SETTINGS["DST"](include=["net.0.*"]), SETTINGS[second](include=["net.[24].*"])]

    first, other = pair()
    fit([first, other], max_epochs=2)[1].save_checkpoint(tmp_path / "two.ckpt")
    assert set(first.masks) == {"net.0.weight"}
    assert set(other.masks) == {"net.2.weight", "net.4.weight"}

    whole = pair()
    expected, _ = fit(whole, max_epochs=4)
    resumed = pair()
    module = seeded(Lit, 5)
    trainer(resumed, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    if second == "DST":  # AutoSparse anneals over all epochs of the fit, which were 2 at first
        assert same(module.state_dict(), expected.state_dict())
        assert all(same(ours.thresholds, theirs.thresholds) for ours, theirs in zip(resumed, whole, strict=True))
    else:
        assert set(resumed[1].masks) == set(other.masks)


def test_masks_are_readable_in_every_hook_and_equal_the_parameters():
    from lightning.pytorch import Callback

    callback = SETTINGS["DST"]()

    class Spy(Callback):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps += 1
            assert all(torch.equal(m, pl_module.get_parameter(n) != 0) for n, m in callback.masks.items())

    spy = Spy()
    fit([callback, spy], max_epochs=1)
    assert spy.steps == 30
