"""Checkpoints of sparse layers: plain or of the nonzeros alone, resumed to the last bit, and given back dense."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    PLAINLY,
    Lit,
    fit,
    loader,
    saved,
    seeded,
    trainer,
)
from stored import METHODS, OPTIMIZERS, UPDATES, images
from torch import nn

import lightning_sparse.storage.sparse as training
from lightning_sparse.storage import SparseLinear, load_dense, to_dense

VARIANTS = [("momentum", True), ("adamw", False)]
RESUMED = [(method, *VARIANTS[index % 2]) for index, method in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "optimizer", "plain"), RESUMED)
def test_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(method, optimizer, plain, tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def module(seed=0):
        return seeded(lambda: Lit(images(), OPTIMIZERS[optimizer], schedule), seed)

    class Saves(pl.Callback):
        def on_train_epoch_end(self, run, module):
            if run.current_epoch == 1:
                with torch.no_grad():
                    module.net[6].values[:2] = torch.tensor([0.0, -0.0])  # of active connections
                run.save_checkpoint(tmp_path / "middle.ckpt")

    whole = METHODS[method](storage="sparse", plain_checkpoints=plain)
    resumed = METHODS[method](storage="sparse", plain_checkpoints=not plain)  # reads both
    theirs, first = fit([whole, Saves()], module(), loader(120), max_epochs=3)
    ours = module(5)
    second = trainer(resumed, max_epochs=3)
    second.fit(ours, loader(120), ckpt_path=tmp_path / "middle.ckpt", **PLAINLY)
    assert second.global_step == first.global_step == 45
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    a, b = (run.optimizers[0].state_dict() for run in (first, second))
    assert a["param_groups"] == b["param_groups"]
    for key, kept in a["state"].items():
        assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(b["state"][key][k])) for k in kept)
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert resumed.extra_metrics == whole.extra_metrics
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


class SavesEachEpoch(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, run, module):
        run.save_checkpoint(self.path, weights_only=run.current_epoch == 0)


@pytest.mark.parametrize("method", UPDATES)
def test_checkpoint_written_during_a_fit_is_loaded_by_the_plain_module(method, tmp_path):
    callback, path = METHODS[method](storage="sparse"), tmp_path / "last.ckpt"
    module, _ = fit([callback, SavesEachEpoch(path)])
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Lit().state_dict())
    for found in (Lit.load_from_checkpoint(path, weights_only=True).state_dict(), load_dense(path)):
        assert all(torch.equal(found[name], x) for name, x in module.state_dict().items())
    for name, mask in callback.masks.items():
        positions = checkpoint["callbacks"][callback.state_key]["weights"][name]["positions"]
        assert torch.equal(positions.long(), mask.reshape(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("limit", [4 * 392, 4 * 392 - 1])
def test_checkpoints_are_plain_up_to_the_limit(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", limit)
    for asked in (None, True, False):
        fit([METHODS["SET"](storage="sparse", plain_checkpoints=asked), SavesEachEpoch(tmp_path / "w.ckpt")])
        state = torch.load(tmp_path / "w.ckpt", weights_only=True)["state_dict"]
        plain = limit == 4 * 392 if asked is None else asked
        assert ("net.0.weight" in state, "net.0.values" in state) == (plain, not plain)


def test_checkpoint_holds_the_nonzeros_alone_if_asked_and_load_dense_gives_the_plain_keys(tmp_path):
    callback = METHODS["MemoryEfficientDST grabo"](storage="sparse", plain_checkpoints=False)
    module, _ = fit([callback, SavesEachEpoch(tmp_path / "last.ckpt")])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    sizes = {key: x.numel() for key, x in checkpoint["state_dict"].items()}
    assert sizes["net.0.values"] + sizes["net.2.values"] + sizes["net.4.values"] == 78
    assert not any(key.endswith("weight") for key in sizes)
    assert "positions" not in str(checkpoint["callbacks"])
    for given in (checkpoint, tmp_path / "last.ckpt", str(tmp_path / "last.ckpt")):
        plain = load_dense(given)
        assert plain.keys() == Lit().state_dict().keys()
        assert all(torch.equal(plain[name], x) for name, x in module.state_dict().items())
    Lit().load_state_dict(plain)


def test_load_dense_says_what_is_wrong_with_what_it_is_given(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint must be a file that exists, got '.*nowhere'\. Give a Trainer"
    ):
        load_dense(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file that exists"):
        load_dense(str(tmp_path))
    with pytest.raises(ValueError, match="checkpoint must be the path of a file, got one of type Linear"):
        load_dense(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"with a 'state_dict' in it, got one that holds weight, bias\. Of a state dict"
    ):
        load_dense(nn.Linear(2, 2).state_dict())
    torch.save(torch.ones(2), tmp_path / "tensor")
    with pytest.raises(ValueError, match="with a 'state_dict' in it, got one that holds Tensor"):
        load_dense(tmp_path / "tensor")
    (tmp_path / "text").write_text("no checkpoint")
    torch.save({"state_dict": {}, "network": nn.Linear(2, 2)}, tmp_path / "module")
    for name in ("text", "module"):
        with pytest.raises(ValueError, match=rf"got '.*{name}', which torch.load refuses .* weights_only=False"):
            load_dense(tmp_path / name)
    assert load_dense(torch.load(tmp_path / "module", weights_only=False)) == {}


@pytest.mark.parametrize("plain", [True, False])
def test_checkpoint_of_the_weights_alone_is_plain_or_made_so(plain, tmp_path):
    callback = METHODS["SET"](storage="sparse", plain_checkpoints=plain)
    fit([callback, SavesEachEpoch(tmp_path / "w.ckpt")], max_epochs=1)
    Lit().load_state_dict(load_dense(tmp_path / "w.ckpt"))
    if plain:
        Lit.load_from_checkpoint(tmp_path / "w.ckpt", weights_only=True)


@pytest.mark.parametrize("plain", [True, False])
def test_checkpoint_written_after_the_fit_can_be_continued(plain, tmp_path):
    def callback():
        return METHODS["SET"](storage="sparse", plain_checkpoints=plain)

    module, run = fit(callback(), seeded(lambda: Lit(images())), max_epochs=1)
    checkpoint = saved(run, tmp_path / "end.ckpt")
    assert ("net.1.values" in checkpoint["state_dict"]) != plain
    assert type(module.net[1]) is nn.Conv2d
    assert all(torch.equal(load_dense(checkpoint)[name], x) for name, x in module.state_dict().items())
    longer = trainer(callback(), max_epochs=2)
    longer.fit(seeded(lambda: Lit(images()), 4), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert longer.global_step == 60


def test_state_dict_is_taken_back_during_a_fit_though_connections_are_0():
    class Swaps(pl.Callback):
        def on_train_epoch_end(self, run, module):
            layer = module.net[2]
            layer.values.data[:3] = 0
            kept, before = module.state_dict(), [layer.positions, layer.values.detach().clone()]
            layer.values.data += 1
            module.load_state_dict(kept)
            assert torch.equal(layer.positions, before[0])
            assert torch.equal(layer.values, before[1])

    fit([METHODS["SET"](storage="sparse"), Swaps()])


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_checkpoint_is_evaluated_in_the_module_be_it_plain_or_sparse(stage, plain, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", limit)
    callback = METHODS["SET"](storage="sparse", plain_checkpoints=plain)
    module, run = fit([callback, SavesEachEpoch(tmp_path / "last.ckpt")])
    assert type(module.net[0]) is (nn.Linear if limit else SparseLinear)
    expected = copy.deepcopy(to_dense(copy.deepcopy(module)).state_dict())
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    getattr(run, stage)(module, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    found = to_dense(module).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert not module._load_state_dict_pre_hooks


def test_a_plain_checkpoint_is_evaluated_without_the_callback(tmp_path):
    module, _ = fit([METHODS["SET"](storage="sparse"), SavesEachEpoch(tmp_path / "last.ckpt")])
    other = Lit()
    trainer([]).test(other, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in other.state_dict().items())
