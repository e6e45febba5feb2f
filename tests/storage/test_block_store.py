"""``storage="block"``: the same training as with masks of the same pattern, in layers that hold blocks alone."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAINLY, Lit, SavesFirst, Scaler, Unmixed, fit, loader, mlp, same, saved, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_sparse.storage.sparse as training
from lightning_sparse import GGR, MEST, SET, FixedMask, RandomPruning, RigL
from lightning_sparse.export import load_sparse, save_sparse, to_csr
from lightning_sparse.kernels import dispatch
from lightning_sparse.storage import BlockLinear, load_dense

OPTIONS = {"pattern": "block:2x2", "update_every": 3, "drop_fraction": 0.5, "seed": 3}
METHODS = {
    "SET": lambda **kw: SET(0.6, **OPTIONS, **kw),
    "RigL": lambda **kw: RigL(0.6, **OPTIONS, **kw),
    "GGR": lambda **kw: GGR(0.6, **OPTIONS, **kw),
    "MEST": lambda **kw: MEST(0.6, **OPTIONS, **kw),
    "FixedMask": lambda **kw: FixedMask(0.6, pattern="block:2x2", initial="magnitude", **kw),
}
ADAMW = {"RigL": lambda p: torch.optim.AdamW(p, lr=0.01)}


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """No kernels are compiled: what they compute is tested by itself."""
    monkeypatch.setattr(dispatch, "module", lambda kind, backend: None)


def run(method, storage, *others):
    callback, module = METHODS[method](storage=storage), seeded(lambda: Lit(mlp(torch.float64), ADAMW.get(method)))
    fit([callback, *others], module, loader(64, dtype=torch.float64), precision="64-true")
    return callback, module


class Looks(pl.Callback):
    """See what the layers are while they train."""

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        layers = module.net[::2]
        assert all(type(layer) is BlockLinear and layer.block == (2, 2) for layer in layers)
        for layer in layers:
            assert layer.values.shape == (4 * len(layer.block_col),)
            for state in run.optimizers[0].state[layer.values].values():
                assert state.shape in ((), layer.values.shape)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_with_masks(method):
    masked, theirs = run(method, "masked")
    block, ours = run(method, "block", Looks())
    assert masked.masks.keys() == block.masks.keys()
    for name, mask in masked.masks.items():
        assert torch.equal(block.masks[name], mask), name
    for name, x in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], x, rtol=0, atol=1e-11), name
    assert {type(layer) for layer in ours.net[::2]} == {nn.Linear}, "dense again after the fit"


class Overflows(Lit):
    """The loss of one batch is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 else loss


def test_accumulation_clipping_and_a_gradient_scaler_that_skips_a_step_change_nothing():
    def train(storage):
        callback, scaler = METHODS["SET"](storage=storage), Scaler()
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "plugins": Unmixed(scaler)}
        module = seeded(lambda: Overflows(mlp(torch.float64)))
        fit(callback, module, loader(160, dtype=torch.float64), max_epochs=1, **options)
        return callback, module, scaler.skipped

    (masked, theirs, skipped), (block, ours, also) = train("masked"), train("block")
    assert skipped == also == 1
    assert same(masked.masks, block.masks)
    for name, x in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], x, rtol=0, atol=1e-11), name


@pytest.mark.parametrize(
    ("writes", "reads", "plain"),
    [
        ("block", "block", True),
        ("block", "block", False),
        ("block", "masked", True),
        ("masked", "block", True),
        ("sparse", "block", False),
    ],
)
def test_a_resumed_run_ends_as_if_never_stopped_whatever_storage_goes_on(writes, reads, plain, tmp_path):
    def method(storage):
        options = {} if storage == "masked" else {"plain_checkpoints": plain}
        return METHODS["RigL"](storage=storage, **options)

    def module(seed):
        return seeded(lambda: Lit(mlp(torch.float64), ADAMW["RigL"]), seed)

    train, path = loader(64, dtype=torch.float64), tmp_path / "first.ckpt"
    whole = method(writes)
    theirs, _ = fit([whole, SavesFirst(path)], module(0), train, precision="64-true")
    resumed, ours = method(reads), module(5)
    trainer(resumed, precision="64-true").fit(ours, train, ckpt_path=path, **PLAINLY)
    assert same(whole.masks, resumed.masks)
    for name, x in theirs.state_dict().items():
        other = ours.state_dict()[name]
        assert torch.equal(other, x) if writes == reads else torch.allclose(other, x, rtol=0, atol=1e-11), name
    loaded = load_dense(path)
    assert loaded.keys() == theirs.state_dict().keys()


def test_a_large_module_keeps_its_blocks_and_saves_them_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    callback = METHODS["SET"](storage="block")
    module, fitted = fit(callback, train=loader(64))
    assert {type(layer) for layer in module.net[::2]} == {BlockLinear}
    x = torch.randn(3, 12)
    y = module(x)
    state = saved(fitted, tmp_path / "last.ckpt")["state_dict"]
    assert state["net.0.values"].shape == module.net[0].values.shape
    save_sparse(module, tmp_path / "net.safetensors")
    plain = Lit()
    plain.load_state_dict(load_sparse(tmp_path / "net.safetensors"))
    torch.testing.assert_close(plain(x), y)
    torch.testing.assert_close(to_csr(module)(x), y)
    module, _ = fit(callback, module, loader(16), max_epochs=1)  # goes on
    assert {type(layer) for layer in module.net[::2]} == {BlockLinear}
    for other in (SET(0.6, pattern="block:2x4", storage="block"), SET(0.6, storage="sparse")):
        with pytest.raises(MisconfigurationException, match=r"held by a sparse layer|connections"):
            fit(other, module, loader(16), max_epochs=1)


def test_layers_that_cannot_be_divided_stay_dense_and_others_are_refused_by_name():
    callback = RandomPruning(0.5, pattern="block:4x4", storage="block")
    module, _ = fit(callback, train=loader(8), max_epochs=1)
    assert set(callback.masks) == {"net.0.weight"}, "10 divides by neither"
    assert isinstance(module.net[2], nn.Linear)
    network = nn.Sequential(nn.Unflatten(1, (4, 3, 1)), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(MisconfigurationException, match=r"plain nn.Linear layers only, not net\.1\.weight \(Conv2d\)"):
        fit(RandomPruning(0.5, pattern="block:2x2", storage="block"), Lit(network), loader(8))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=f"storage='block' must have pattern='block:RxC', .* got '{pattern}'. Give"):
        SET(0.6, pattern=pattern, storage="block")
