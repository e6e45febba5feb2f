"""Annealing of alpha: values worked out by hand, and what AutoSparse makes of them."""

import math

import lightning.pytorch as pl
import pytest
from helpers import Lit, fit, loader, seeded, trainer
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse import AutoSparse
from lightning_sparse.schedules import ANNEALING

# f(i, 4) for i = 0 ... 4
TABLE = {
    "none": [1, 1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25, 0],
    "cosine": [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0],
    "sigmoid": [1 / (1 + math.exp(-6)), 1 / (1 + math.exp(-3)), 0.5, 1 / (1 + math.exp(3)), 1 / (1 + math.exp(6))],
    "sigmoid_cosine": [1, 1 / (1 + math.exp(-3)), 0.5, (1 - math.sqrt(0.5)) / 2, 1 / (1 + math.exp(6))],
    "exponential": [1, math.exp(-1), math.exp(-2), math.exp(-3), math.exp(-4)],
}


@pytest.mark.parametrize("decay", ANNEALING)
def test_values_are_the_papers(decay):
    assert [ANNEALING[decay](i, 4, 1.0) for i in range(5)] == pytest.approx(TABLE[decay], abs=1e-12)


def test_every_decay_has_its_row():
    assert TABLE.keys() == ANNEALING.keys()


def test_exponential_uses_its_rate():
    assert ANNEALING["exponential"](3, 100, 0.5) == pytest.approx(math.exp(-1.5))


@given(st.sampled_from(sorted(ANNEALING)), st.integers(1, 300), st.integers(0, 400), st.floats(0, 3))
def test_factors_stay_between_0_and_1_and_never_rise(decay, epochs, i, beta):
    now, later = ANNEALING[decay](i, epochs, beta), ANNEALING[decay](i + 1, epochs, beta)
    assert 0 <= later <= now <= 1


@pytest.mark.parametrize("decay", ANNEALING)
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
