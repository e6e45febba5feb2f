"""Phases of a training that is dense and sparse in turn."""

import pytest

from lightning_sparse.rules.phases import alternating, cycles_that_fit


def test_the_authors_phases_of_200_epochs_on_cifar_100():
    """Their program prunes at epochs 10, 50, ..., 170 and restores at 30, 70, ..., 150."""
    assert alternating(10, 150, 170, 4).begins == (10, 30, 50, 70, 90, 110, 130, 150, 170)


@pytest.mark.parametrize("steps", range(1, 40))
@pytest.mark.parametrize("epoch", [1, 3, 10])
def test_phases_begin_at_different_steps_whatever_the_training(steps, epoch):
    begins = alternating(2, 2 + steps, 3 + steps, cycles_that_fit(steps, epoch)).begins
    assert list(begins) == sorted(set(begins))
    assert begins[0] == 2
    assert len(begins) % 2, "the last phase is sparse"


def test_without_cycles_the_training_is_pruned_once():
    assert alternating(0, 0, 5, cycles_that_fit(0, 1)).begins == (5,)
