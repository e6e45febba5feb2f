"""Annealing of alpha: values worked out by hand, and what AutoSparse makes of them."""

import math
from itertools import pairwise
from typing import get_args

import lightning.pytorch as pl
import pytest
from helpers import Lit, fit, loader, same, seeded, trainer, watched
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse import AutoSparse, RigL
from lightning_sparse.rules.schedules import DECAYS, Annealing, Decay, annealed

# in epoch i = 0 ... 4 of 4
TABLE = {
    "none": [1, 1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25, 0],
    "cosine": [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0],
    "sigmoid": [1 / (1 + math.exp(-6)), 1 / (1 + math.exp(-3)), 0.5, 1 / (1 + math.exp(3)), 1 / (1 + math.exp(6))],
    "sigmoid_cosine": [1, 1 / (1 + math.exp(-3)), 0.5, (1 - math.sqrt(0.5)) / 2, 1 / (1 + math.exp(6))],
    "halving": [1, 1, 1, 0.5, 0],
    "exponential": [1, math.exp(-1), math.exp(-2), math.exp(-3), math.exp(-4)],
}


@pytest.mark.parametrize("decay", get_args(Annealing))
def test_values_are_the_papers(decay):
    assert [annealed(1.0, decay, 1.0, i, 4) for i in range(5)] == pytest.approx(TABLE[decay], abs=1e-12)


def test_every_decay_has_its_row():
    assert list(TABLE) == list(get_args(Annealing))
    assert list(DECAYS) == list(get_args(Decay))


def test_exponential_uses_its_rate():
    assert annealed(2.0, "exponential", 0.5, 3, 100) == pytest.approx(2 * math.exp(-1.5))


@given(st.sampled_from(get_args(Annealing)), st.integers(1, 300), st.integers(0, 400), st.floats(0, 3))
def test_factors_stay_between_0_and_1_and_never_rise(decay, epochs, i, rate):
    now, later = (annealed(1.0, decay, rate, epoch, epochs) for epoch in (i, i + 1))
    assert 0 <= later <= now <= 1


@pytest.mark.parametrize("decay", DECAYS)
def test_connections_move_under_every_decay(decay):
    watch, _, _ = watched(RigL(0.8, decay=decay, update_every=5))
    moved = [step for step, (then, now) in enumerate(pairwise(watch.masks), 1) if not same(then, now)]
    assert moved == [5]


def test_decays_of_connections_are_of_the_training_not_of_epochs():
    with pytest.raises(ValueError, match=r"decay must be one of .*'linear'.*, got 'exponential'"):
        RigL(0.8, decay="exponential")


@pytest.mark.parametrize("decay", get_args(Annealing))
def test_autosparse_anneals_once_an_epoch(decay):
    callback = AutoSparse(alpha=0.8, decay=decay)
    seen = Alphas(callback)
    fit([callback, seen], max_epochs=4)
    assert [len(set(alphas)) for alphas in seen.alphas] == [1] * 4
    assert [alphas[0] for alphas in seen.alphas] == pytest.approx([0.8 * factor for factor in TABLE[decay][:4]])


def test_alpha_is_zero_from_alpha_zero_epoch_on():
    callback = AutoSparse(alpha=0.8, decay="none", alpha_zero_epoch=2)
    seen = Alphas(callback)
    fit([callback, seen], max_epochs=4)
    assert [alphas[0] for alphas in seen.alphas] == [0.8, 0.8, 0, 0]
    assert callback.gradient_density == callback.density


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_epochs": 4}, 4),
        ({"max_epochs": -1, "max_steps": 90}, 3),
        ({"max_epochs": -1, "max_steps": 91}, 4),
        ({"max_epochs": 7, "max_steps": 60}, 2),
        ({"max_epochs": -1, "max_steps": 16, "accumulate_grad_batches": 4}, 2),  # 30 batches are 8 steps
    ],
)
def test_the_number_of_epochs_is_that_of_the_whole_fit(options, epochs):
    callback = AutoSparse(alpha=1.0, decay="linear")
    seen = Alphas(callback)
    trainer([callback, seen], **options).fit(seeded(Lit), loader())
    assert [alphas[0] for alphas in seen.alphas] == pytest.approx([1 - i / epochs for i in range(len(seen.alphas))])
    assert len(seen.alphas) == epochs


class Alphas(pl.Callback):
    """Alpha at every batch of every epoch."""

    def __init__(self, callback):
        self.callback, self.alphas = callback, []

    def on_train_epoch_start(self, *args):
        self.alphas.append([])

    def on_train_batch_end(self, *args):
        self.alphas[-1].append(self.callback.current_alpha)
