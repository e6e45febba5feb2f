"""A run that was stopped, however and wherever, goes on in a fresh process as if it had never been."""

import copy

import pytest
import resumed
import torch
from helpers import (
    HOOKED,
    PLAINLY,
    REPRESENTATIVES,
    SETTINGS,
    THRESHOLDS,
    Lit,
    cnn,
    fit,
    loader,
    same,
    saved,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_fresh


@pytest.mark.parametrize("method", resumed.METHODS)
def test_resumed_runs_equal_uninterrupted_ones_to_the_last_bit(method, tmp_path):
    run_fresh(resumed.run_all, ["stopped"], tmp_path, method)
    run_fresh(resumed.run_all, ["whole", "resumed"], tmp_path, method)
    for case in resumed.cases(method):
        optimizer, stop, accumulate = case
        check_stop(tmp_path / f"{resumed.name(*case)}.ckpt", stop, accumulate)
        whole = torch.load(tmp_path / f"{resumed.name(optimizer, stop == 'step', accumulate)}.whole.pt")
        again = torch.load(tmp_path / f"{resumed.name(*case)}.resumed.pt")
        assert whole["steps"] == resumed.EPOCHS * resumed.BATCHES // accumulate, case
        assert 0.02 < whole["sparsity"] < 0.98, "the test would prove nothing"
        assert whole["optimizer"]["state"]
        assert [key for key in whole if not same(whole[key], again[key])] == [], case


def check_stop(path, stop, accumulate):
    """Look whether a run was stopped where it should be."""
    checkpoint = torch.load(path, weights_only=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    steps = {"epoch": 12, "middle": 12 + 3 * accumulate, "data": 17, "step": 17, "sigterm": 18}[stop]
    assert checkpoint["global_step"] == steps // accumulate
    assert steps - 1 <= batches <= steps


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


def test_checkpoint_is_loaded_with_weights_only(method, tmp_path):
    callback = SETTINGS[method]()
    _, run = fit(callback, max_epochs=1)
    state = saved(run, tmp_path / "last.ckpt")["callbacks"][callback.state_key]
    kinds = set()

    def walk(value):
        kinds.add(type(value))
        if isinstance(value, dict):
            for item in value.values():
                walk(item)

    walk(state)
    assert kinds <= {dict, str, int, float, bool, torch.Tensor}
    trainer(SETTINGS[method](), max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt", **PLAINLY)


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_training_goes_on_with_a_larger_number_of_epochs_from_a_checkpoint_of_the_end(method, tmp_path):
    callback = SETTINGS[method]()
    _, run = fit(callback, max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = SETTINGS[method]()
    longer = trainer(again, max_epochs=2)
    longer.fit(seeded(Lit, seed=5), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert longer.global_step == 60
    assert again.sparsity > 0


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_same_callback_and_module_can_resume_in_the_same_process(method, tmp_path):
    """Also after an exception, which leaves the callback without teardown."""
    callback = SETTINGS[method]()
    module, run = fit(callback, max_epochs=1)
    run.save_checkpoint(tmp_path / "first.ckpt")
    trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "first.ckpt")
    expected = copy.deepcopy((state(callback), module.state_dict()))

    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 40:
                raise ValueError("on purpose")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="on purpose"):
        trainer(callback, max_epochs=2).fit(seeded(Fails), loader(), ckpt_path=tmp_path / "first.ckpt")
    module = seeded(Lit)
    trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert same(expected, (state(callback), module.state_dict()))


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_a_checkpoint_resumes_after_a_fit_of_another_module_failed(method, tmp_path):
    """An exception ends a fit without teardown: nothing of it may be left in the next one."""

    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            raise ValueError("on purpose")

    expected, callback = SETTINGS[method](), SETTINGS[method]()
    _, run = fit(expected, max_epochs=1)
    run.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises((ValueError, MisconfigurationException), match="on purpose"):
        fit(callback, seeded(lambda: Fails(cnn())))
    for each in (expected, callback):
        trainer(each, max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert same(state(expected), state(callback))


def dense_checkpoint(path):
    module = seeded(Lit)
    run = trainer([], max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(path)
    return path


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_checkpoint_of_another_method_is_refused(method, tmp_path):
    other = "STR" if method != "STR" else "DST"
    _, run = fit(SETTINGS[other](), max_epochs=1)
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(
        MisconfigurationException, match=rf"no state of {method}.*written with {other}.*load_from_checkp"
    ):
        trainer(SETTINGS[method](), max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_dense_checkpoint_is_refused(method, tmp_path):
    path = dense_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match=f"no state of {method}.*without a method of lightning_sparse"):
        trainer(SETTINGS[method](), max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=path)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_weights_only_checkpoint_is_refused(method, tmp_path):
    keep = ModelCheckpoint(tmp_path, "light", save_weights_only=True)
    callback = SETTINGS[method]()
    fit([callback, keep], max_epochs=1, enable_checkpointing=True)
    for candidate in (callback, SETTINGS[method]()):  # whatever state it still holds
        with pytest.raises(
            MisconfigurationException, match=f"light.ckpt has no state of {method}.*save_weights_only.*load_from_checkp"
        ):
            trainer(candidate, max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "light.ckpt")


@pytest.mark.parametrize("method", THRESHOLDS)
def test_checkpoint_of_another_granularity_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](granularity="layer"), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"granularity='layer', this \w+\(.*\) has 'neuron'"):
        trainer(SETTINGS[method](granularity="neuron")).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", REPRESENTATIVES[1:])
def test_checkpoint_of_another_sparsity_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"sparsity=0.8, this \w+\(.*\) has 0.6"):
        trainer(SETTINGS[method](sparsity=0.6)).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_checkpoint_of_another_choice_of_layers_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"no state of .*exclude=\['net.0.*written with "):
        trainer(SETTINGS[method](exclude=["net.0.weight"])).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")
    frozen = seeded(Lit)
    frozen.net[2].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"differ in \['net.2.weight'\]: choose the same weights"):
        trainer(SETTINGS[method](), max_epochs=2).fit(frozen, loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", [*REPRESENTATIVES, "MemoryEfficientDST"])
def test_the_documented_way_starts_from_the_weights_of_any_checkpoint(method, tmp_path):
    """Load it as a plain module and fit without ckpt_path, as the errors say."""
    path = dense_checkpoint(tmp_path / "dense.ckpt")
    module = Lit.load_from_checkpoint(path)
    start = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"]
    callback = SETTINGS[method](**({} if method in THRESHOLDS else {"scale_init": False}))
    fit(callback, module, max_steps=1, max_epochs=1)
    assert torch.allclose(module.net[0].weight, start * callback.masks["net.0.weight"], atol=0.2)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == module.state_dict().keys()

    other = "STR" if method != "STR" else "DST"
    _, run = fit(SETTINGS[other](), max_epochs=2)
    run.save_checkpoint(tmp_path / "other.ckpt")
    module = Lit.load_from_checkpoint(tmp_path / "other.ckpt")
    zeros = module.net[0].weight == 0
    assert zeros.any()
    fit(SETTINGS[method](), module, max_epochs=1)
