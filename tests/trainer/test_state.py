"""What a callback carries from fit to fit, into copies and pickles, and beside others of its kind."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    HOOKED,
    LATENT,
    MASKED,
    REPRESENTATIVES,
    SETTINGS,
    THRESHOLDS,
    Lit,
    cnn,
    effective,
    fit,
    loader,
    same,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import STR


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


def plain_sgd(p):
    return torch.optim.SGD(p, lr=0.1, weight_decay=1e-3)


@pytest.mark.parametrize("method", [method for method in LATENT if method != "OptG"])  # its schedule spans a fit
def test_second_fit_goes_on_from_latents_and_thresholds(method):
    """Without momentum, which belongs to the optimizer, two fits of one epoch are one of two."""
    options = {"decay": "none"} if method in ("AutoSparse", "TopKAST") else {}
    whole, halves = SETTINGS[method](**options), SETTINGS[method](**options)
    fit(whole, seeded(lambda: Lit(optimizer=plain_sgd)), max_epochs=2)
    module = seeded(lambda: Lit(optimizer=plain_sgd))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*starts afresh")
        for _ in range(2):
            fit(halves, module, max_epochs=1)
    assert whole.sparsity > 0
    assert same(state(whole), state(halves))


@pytest.mark.parametrize("method", MASKED)
def test_second_fit_goes_on_from_the_masks(method):
    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            started.append(dict(callback.masks))

    started, callback = [], SETTINGS[method]()
    module, _ = fit(callback)
    ended = callback.masks
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*starts afresh")
        fit([callback, Looks()], module, max_epochs=1)
    assert callback.sparsity > 0
    assert same(started[0], ended)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_state_stays_readable_after_fit(method):
    callback = SETTINGS[method]()
    module, _ = fit(callback)
    for name, mask in callback.masks.items():
        p = module.get_parameter(name)
        assert mask.dtype == torch.bool
        assert mask.shape == p.shape
    assert effective(module, callback)
    assert callback.density == pytest.approx(1 - callback.sparsity)
    assert callback.layer_density.keys() == callback.masks.keys()
    if method in LATENT:
        assert callback.masks.keys() == callback.latents.keys()
    if method in THRESHOLDS:
        assert callback.masks.keys() == callback.thresholds.keys()
    if method == "DFBST":
        assert 0 < callback.backward_density < 1
        kept = sum(int(mask.sum()) for mask in callback.backward_masks.values())
        assert callback.backward_density == kept / sum(m.numel() for m in callback.backward_masks.values())


def other_names():
    return Lit(cnn())


@pytest.mark.parametrize(
    ("method", "build"),
    [
        *((method, other_names) for method in (*REPRESENTATIVES, *HOOKED)),
        *((method, Lit) for method in REPRESENTATIVES),
    ],
)
def test_fit_of_another_module_starts_afresh_and_says_so(method, build):
    callback, new = SETTINGS[method](), SETTINGS[method]()
    fit(callback, max_epochs=1)
    with pytest.warns(UserWarning, match=f"This {method}.* holds the state of an earlier fit.*starts afresh"):
        one, _ = fit(callback, seeded(build, seed=3), max_epochs=1)
    two, _ = fit(new, seeded(build, seed=3), max_epochs=1)
    assert same(state(callback), state(new))
    assert same(one.state_dict(), two.state_dict())


def pickled(callback):
    return pickle.loads(pickle.dumps(callback))


@pytest.mark.parametrize(
    ("method", "duplicate"),
    [*((method, pickled) for method in SETTINGS), *((method, copy.deepcopy) for method in REPRESENTATIVES)],
)
def test_callback_can_be_copied_before_during_and_after_fit(method, duplicate):
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20:
                copies.append((duplicate(callback), callback.masks))

    copies = []
    callback = duplicate(SETTINGS[method]())
    module, _ = fit([callback, Copies()], max_epochs=1)
    copies.append((duplicate(callback), callback.masks))
    for twin, masks in copies:
        assert all(torch.equal(mask, twin.masks[name]) for name, mask in masks.items())
        assert twin._fit.trainer is None
        assert all(weight.parameter is None for weight in twin._weights.values())
    assert method in MASKED or not same(state(copies[0][0]), state(callback))
    during, after = copies[0][0], copies[1][0]
    assert len(pickle.dumps(during)) < 40_000, "neither Trainer nor module are in it"
    assert after.state_key == callback.state_key

    other = copy.deepcopy(module)  # the copy goes on as the original does
    for one, its in ((callback, module), (after, other)):
        fit(one, its, max_epochs=1)
    assert same(state(after), state(callback))
    assert same(module.state_dict(), other.state_dict())


@pytest.mark.parametrize("second", ["DST", "RigL"])
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_two_methods_that_claim_the_same_weights_are_refused_by_name(method, second):
    one, two = SETTINGS[method](exclude=["net.2.*"]), SETTINGS[second](include=["net.2.*", "net.4.*"])
    with pytest.raises(
        MisconfigurationException, match=rf"{method}.* and {second}.* both claim \['net.4.weight'\].*exclude"
    ):
        fit([one, two])


@pytest.mark.parametrize("second", ["DST", "RigL"])
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_two_methods_with_weights_of_their_own_work_and_resume(method, second, tmp_path):
    def pair():
        return [SETTINGS[method](include=["net.0.*"]), SETTINGS[second](exclude=["net.0.*"])]

    whole, stopped, resumed = pair(), pair(), pair()
    module, _ = fit(whole, max_epochs=2)
    assert [set(callback.masks) for callback in whole] == [{"net.0.weight"}, {"net.2.weight", "net.4.weight"}]
    for callback in whole:
        assert callback.sparsity > 0
        assert effective(module, callback)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    _, run = fit([*stopped, Stop()], max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(resumed, max_epochs=2).fit(seeded(Lit, 9), loader(), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole, resumed, strict=True):
        assert same(state(one), state(other))


def test_thresholds_are_not_resumed_with_each_others_momentum(tmp_path):
    def pair():
        return [SETTINGS["DST"](include=["net.0.*"]), SETTINGS["DFBST"](exclude=["net.0.*"])]

    _, run = fit(pair(), max_epochs=1)
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(
        MisconfigurationException,
        match=r"has the threshold of net\.2\.weight at index 7 .*would be at index 6.*same order",
    ):
        trainer(pair()[::-1], max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_thresholds_that_joined_late_are_resumed_with_their_own_momentum(tmp_path):
    class Thaws(Lit):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

    class Saves(pl.Callback):
        def on_train_epoch_end(self, run, module):
            if run.current_epoch == 1:
                run.save_checkpoint(tmp_path / "two.ckpt")

    module, whole, resumed = seeded(Thaws), SETTINGS["DST"](), SETTINGS["DST"]()
    module.net[0].requires_grad_(False)
    fit([whole, Saves()], module, max_epochs=3)
    again = seeded(Thaws, 9)
    trainer(resumed, max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert same(state(whole), state(resumed))
    assert same(module.state_dict(), again.state_dict())


def test_weights_that_join_later_are_not_taken_from_another_method():
    class Joins(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[:4].parameters(), lr=0.1, weight_decay=1e-3)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[4].parameters())})

    one, two = STR(-2.5, include=["net.0.*", "net.4.*"]), STR(-2.5, include=["net.2.*", "net.4.*"])
    with pytest.raises(MisconfigurationException, match=r"both claim \['net.4.weight'\]"):
        fit([one, two], seeded(Joins))


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, "callback") for method in (*REPRESENTATIVES, *HOOKED)),
        *((method, "tuner") for method in REPRESENTATIVES),
    ],
)
def test_the_learning_rate_finder_leaves_no_trace(method, how, tmp_path):
    class Rate(Lit):
        lr = 0.1

        def configure_optimizers(self):
            return plain_sgd(self.parameters()) if self.lr == 0.1 else torch.optim.SGD(self.parameters(), self.lr)

    callback, alone = SETTINGS[method](), SETTINGS[method]()
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 1}
    module = seeded(Rate)
    if how == "tuner":
        run = trainer(callback, **options)
        Tuner(run).lr_find(module, loader(), num_training=20, update_attr=False)
    else:
        run = trainer([callback, LearningRateFinder(num_training_steps=20, update_attr=False)], **options)
    run.fit(module, loader())
    other, _ = fit(alone, seeded(Rate), max_epochs=1)
    assert callback.sparsity > 0
    assert same(state(alone), state(callback))
    assert same(module.state_dict(), other.state_dict())


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_a_failed_fit_leaves_a_callback_that_can_be_used_again(method):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if batch_idx == 9:
                raise ValueError("on purpose")
            return super().training_step(batch, batch_idx)

    callback, fresh = SETTINGS[method](), SETTINGS[method]()
    with pytest.raises(ValueError, match="on purpose"):
        fit(callback, seeded(Fails))
    with pytest.warns(UserWarning, match="starts afresh"):
        one, _ = fit(callback, seeded(Lit), max_epochs=1)
    two, _ = fit(fresh, max_epochs=1)
    assert same(state(fresh), state(callback))
    assert same(one.state_dict(), two.state_dict())


def test_a_spawned_process_takes_up_the_callback():
    """Whose pickle is read when the tensors made for it are gone."""
    callback = SETTINGS["SET"]()
    fit(callback, max_epochs=1)
    held = {id(value) for value in vars(callback).values()}
    made = [value for value in callback.__getstate__().values() if isinstance(value, torch.Tensor)]
    assert all(id(value) in held for value in made)
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.generator.get_state(), callback.generator.get_state())
