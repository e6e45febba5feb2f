"""Averages of weights over time are as sparse as the network, in what is validated and saved."""

import lightning.pytorch as pl
import pytest
import torch
from averaging import EMAWeightAveraging, WeightAveraging
from helpers import SETTINGS, Lit, StopsAfter, fit, loader, same, seeded, trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

METHODS = ["RigL", "DeepR", "SNIP", "GMP", "DST", "TopKAST", "FixedMask"]
KINDS = {
    "mean": WeightAveraging,
    "exponential": lambda: EMAWeightAveraging(decay=0.8),
    "of epochs": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
}


class Denser(pl.Callback):
    """Counts weights of averages that are nonzero where the network is 0, in validation and in checkpoints."""

    def __init__(self, callback, path):
        self.callback, self.path, self.looks, self.denser = callback, path, 0, 0

    def count(self, parameters):
        self.looks += 1
        self.denser += sum(int((parameters[name] != 0)[~mask].sum()) for name, mask in self.callback.masks.items())

    def on_validation_batch_start(self, trainer, module, *args):
        if not trainer.sanity_checking or type(self.callback).__name__ != "SNIP":  # which is dense until training
            self.count(dict(module.named_parameters()))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx % 8 == 7:
            trainer.save_checkpoint(self.path)
            # torch 2.4 pickles a method of the schedule of learning rates, which the safe loader refuses
            self.count(torch.load(self.path, weights_only=False)["state_dict"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "first"), [*((method, True) for method in METHODS), ("RigL", False), ("TopKAST", False)]
)
@pytest.mark.filterwarnings("ignore:.*weight left")
def test_averages_are_0_wherever_the_network_is(method, kind, first, tmp_path):
    callback, average = SETTINGS[method](), KINDS[kind]()
    look = Denser(callback, tmp_path / "one.ckpt")
    callbacks = [callback, average] if first else [average, callback]
    run = trainer([*callbacks, look], max_epochs=2, val_check_interval=5)
    module = seeded(Lit)
    run.fit(module, loader(120), loader(8))
    assert look.looks > 6
    assert look.denser == 0
    look.count(dict(module.named_parameters()))
    assert look.denser == 0, "at the end"
    assert callback.sparsity > 0


@pytest.mark.parametrize("kind", ["mean", "exponential"])
@pytest.mark.parametrize("method", ["RigL", "DST"])
def test_a_resumed_run_goes_on_with_the_same_average(method, kind, tmp_path):
    def run(seed, *others, **options):
        module = seeded(Lit, seed)
        trainer([SETTINGS[method](), KINDS[kind](), *others]).fit(module, loader(), **options)
        return module.state_dict()

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    whole = run(0, Saves())
    assert same(whole, run(3, ckpt_path=tmp_path / "one.ckpt"))


def test_the_training_itself_is_that_without_an_average():
    alone, beside = SETTINGS["RigL"](), SETTINGS["RigL"]()
    fit(alone, max_epochs=2)
    fit([beside, EMAWeightAveraging(decay=0.5), StopsAfter(5)], max_epochs=2)
    assert same(alone.masks, beside.masks)
