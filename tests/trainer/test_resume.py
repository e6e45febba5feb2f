"""A run that was stopped, however and wherever, goes on in a fresh process as if it had never been."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import resume_script
import torch
from helpers import MASKED, SETTINGS, THRESHOLDS, TOP_K, Lit, cnn, fit, loader, same, saved, seeded, state, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

SCRIPT = Path(__file__).parent / "resume_script.py"


def launch(*arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPT.parent), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], check=True, env=environment, timeout=600)


def launch_all(folder):
    launch("stopped", folder)
    launch("resumed", folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory, worker_id):
    """All cases, trained once however many workers there are."""
    if worker_id == "master":
        folder = tmp_path_factory.mktemp("resume")
        launch_all(folder)
        return folder
    return _once(tmp_path_factory.getbasetemp().parent / "resume")


def _once(folder):
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 1200
        while not (folder / "done").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (folder / "done").read_text() == "", "the runs failed in another worker"
        return folder
    failed = "failed"
    try:
        launch_all(folder)
        failed = ""
    finally:
        (folder / "done").write_text(failed)
    return folder


@pytest.mark.parametrize("case", resume_script.CASES, ids=lambda case: resume_script.name(*case))
def test_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(results, case):
    method, optimizer, stop, accumulate = case
    whole = torch.load(results / f"{resume_script.name(method, optimizer, stop == 'step', accumulate)}.whole.pt")
    resumed = torch.load(results / f"{resume_script.name(*case)}.resumed.pt")
    assert whole["steps"] == resume_script.EPOCHS * resume_script.BATCHES // accumulate
    assert 0.02 < whole["sparsity"] < 0.98, "the test would prove nothing"
    assert whole["optimizer"]["state"]
    assert [key for key in whole if not same(whole[key], resumed[key])] == []


def test_stopped_runs_stopped_where_they_should(results):
    for case in resume_script.CASES:
        checkpoint = torch.load(results / f"{resume_script.name(*case)}.ckpt", weights_only=True)
        *_, stop, accumulate = case
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
    trainer(SETTINGS[method](), max_epochs=2).fit(
        seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )


def test_training_goes_on_with_a_larger_number_of_epochs_from_a_checkpoint_of_the_end(method, tmp_path):
    callback = SETTINGS[method]()
    _, run = fit(callback, max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = SETTINGS[method]()
    longer = trainer(again, max_epochs=2)
    longer.fit(seeded(Lit, seed=5), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert longer.global_step == 60
    assert again.sparsity > 0


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


def test_a_checkpoint_resumes_after_a_fit_of_another_module_failed(method, tmp_path):
    """An exception ends a fit without teardown: nothing of it may be left in the next one."""

    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            raise ValueError("on purpose")

    expected, callback = SETTINGS[method](), SETTINGS[method]()
    _, run = fit(expected, max_epochs=1)
    run.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="on purpose"):
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


def test_checkpoint_of_another_method_is_refused(method, tmp_path):
    other = "STR" if method != "STR" else "DST"
    _, run = fit(SETTINGS[other](), max_epochs=1)
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(
        MisconfigurationException, match=rf"no state of {method}.*written with {other}.*load_from_checkp"
    ):
        trainer(SETTINGS[method](), max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "other.ckpt")


def test_dense_checkpoint_is_refused(method, tmp_path):
    path = dense_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match=f"no state of {method}.*without a method of lightning_sparse"):
        trainer(SETTINGS[method](), max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=path)


def test_weights_only_checkpoint_is_refused(method, tmp_path):
    keep = ModelCheckpoint(tmp_path, "light", save_weights_only=True)
    callback = SETTINGS[method]()
    fit([callback, keep], max_epochs=1, enable_checkpointing=True)
    for candidate in (callback, SETTINGS[method]()):  # whatever state it still holds
        with pytest.raises(
            MisconfigurationException, match=f"light.ckpt has no state of {method}.*load_from_checkpoint"
        ):
            trainer(candidate, max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "light.ckpt")


@pytest.mark.parametrize("method", THRESHOLDS)
def test_checkpoint_of_another_granularity_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](granularity="layer"), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"granularity='layer', this \w+ has 'neuron'"):
        trainer(SETTINGS[method](granularity="neuron")).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", [*TOP_K, *MASKED])
def test_checkpoint_of_another_sparsity_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"sparsity=0.8, this \w+ has 0.6"):
        trainer(SETTINGS[method](sparsity=0.6)).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_checkpoint_of_another_choice_of_layers_is_refused(method, tmp_path):
    _, run = fit(SETTINGS[method](), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"no state of .*'exclude': \['net.0.*written with .*exclude"):
        trainer(SETTINGS[method](exclude=["net.0.weight"])).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")
    frozen = seeded(Lit)
    frozen.net[2].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"differ in \['net.2.weight'\]: choose the same weights"):
        trainer(SETTINGS[method](), max_epochs=2).fit(frozen, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_the_documented_way_starts_from_the_weights_of_any_checkpoint(method, tmp_path):
    """Load it as a plain module and fit without ckpt_path, as the errors say."""
    path = dense_checkpoint(tmp_path / "dense.ckpt")
    module = Lit.load_from_checkpoint(path)
    start = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"]
    callback = SETTINGS[method](**({"scale_init": False} if method == "MemoryEfficientDST" else {}))
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
