"""Groups of weights and their clocks: over fits, checkpoints, and fits that an exception has ended."""

import pytest
import torch
from helpers import SETTINGS, Lit, fit, loader, saved, seeded, trainer
from torch import nn

from lightning_sparse import RigL
from lightning_sparse.weights.group import WeightGroups


def optimizers(count):
    return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(count)]


def test_clocks_are_kept_between_fits_and_begin_at_0_in_the_next():
    groups = WeightGroups()
    groups.begin(optimizers(2), {})
    for step, group in enumerate(groups):
        group.step = step
    groups.end()
    assert [clock["step"] for clock in groups.clocks] == [0, 1]
    groups.begin(optimizers(1), {})
    assert [clock["step"] for clock in groups.clocks] == [0]


class TwoOptimizers(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_a_callback_whose_fit_broke_off_resumes_with_more_optimizers(tmp_path):
    whole, broken = (SETTINGS["RigL"](exclude=["*.4.weight"]) for _ in range(2))
    _, run = fit(whole, seeded(TwoOptimizers), max_epochs=1)
    saved(run, tmp_path / "two.ckpt")

    class Breaks(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(broken, seeded(Breaks))
    trainer(broken, max_epochs=2).fit(seeded(TwoOptimizers, 9), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert isinstance(broken, RigL)
    assert [clock["step"] for clock in broken.state_dict()["clocks"].values()] == [60, 60]
