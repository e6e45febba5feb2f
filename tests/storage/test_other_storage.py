"""A checkpoint of one storage is resumed with the other: same masks, weights and optimizer state, or refused."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAINLY, Lit, fit, loader, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stored import METHODS, OPTIMIZERS, images

STORAGES = {
    "masked": {"storage": "masked"},
    "plain": {"storage": "sparse", "plain_checkpoints": True},
    "nonzeros": {"storage": "sparse", "plain_checkpoints": False},
}


class Saves(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, run, module):
        if run.current_epoch == 0:
            run.save_checkpoint(self.path)


def module(optimizer="momentum", seed=0, network=images):
    return seeded(lambda: Lit(network(torch.float64), OPTIMIZERS.get(optimizer, optimizer)), seed)


def double(**kwargs):
    return {"precision": "64-true", "max_epochs": 2, **kwargs}


@pytest.mark.parametrize(
    ("method", "optimizer"), [("SET", "momentum"), ("RigL", "adamw"), ("ITOP random", "adamw"), ("DSR", "momentum")]
)
@pytest.mark.parametrize(("writes", "reads"), [("masked", "plain"), ("plain", "masked"), ("nonzeros", "masked")])
def test_a_run_goes_on_with_the_other_storage_as_it_would_with_its_own(method, optimizer, writes, reads, tmp_path):
    path, train = tmp_path / "last.ckpt", loader(120, dtype=torch.float64)
    whole = METHODS[method](**STORAGES[writes])
    theirs, first = fit([whole, Saves(path)], module(optimizer), train, **double())
    resumed = METHODS[method](**STORAGES[reads])
    ours, second = module(optimizer, seed=5), trainer(resumed, **double())
    second.fit(ours, train, ckpt_path=path, **PLAINLY)
    assert second.global_step == first.global_step == 30
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    for name, x in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], x, atol=1e-9), name


@pytest.mark.parametrize(("writes", "reads"), [("masked", "plain"), ("nonzeros", "masked")])
def test_a_checkpoint_of_the_other_storage_is_evaluated(writes, reads, tmp_path):
    path, train = tmp_path / "last.ckpt", loader(dtype=torch.float64)
    fit([METHODS["SET"](**STORAGES[writes]), Saves(path)], theirs := module(), train, **double(max_epochs=1))
    ours = module(seed=5)
    run = trainer(METHODS["SET"](**STORAGES[reads]), **double())
    run.test(ours, train, ckpt_path=path, verbose=False)
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in theirs.state_dict().items())


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=0.01)


@pytest.mark.parametrize(("writes", "reads"), [("masked", "plain"), ("plain", "masked")])
@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="newer PyTorch")
def test_what_an_optimizer_keeps_of_whole_matrices_is_refused(writes, reads, tmp_path):
    path, train = tmp_path / "last.ckpt", loader(dtype=torch.float64)
    fit([METHODS["SET"](**STORAGES[writes]), Saves(path)], module(adafactor), train, **double(max_epochs=1))
    with pytest.raises(MisconfigurationException, match=r"Adafactor keeps of net\.\d\.weight .* cannot be c"):
        trainer(METHODS["SET"](**STORAGES[reads]), **double()).fit(module(adafactor, 5), train, ckpt_path=path)
