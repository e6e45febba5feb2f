"""ForeignWrites: what other code has written into the parameters of latent weights becomes part of ``W``."""

import pytest
import torch
from torch import nn

from lightning_sparse.families.foreign_writes import ForeignWrites
from lightning_sparse.families.projection import Projection
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.latent import LatentWeight


class AboveHalf:
    """What is asked of a method: ``P`` is ``W / 2`` where ``|W|`` is at least 0.5."""

    _trained = None

    def __init__(self):
        self._fit, self.seen, self.warnings = Fit(), [], []

    def effective(self, weight, W, out):
        out.copy_(W / 2).masked_fill_(W.abs() < 0.5, 0)

    def latent(self, weight, P):
        return P * 2

    def written(self, optimizer, weights):
        self.seen += [weight.name for weight in weights]

    def warn_once(self, message):
        self.warnings.append(message)


@pytest.fixture
def case():
    """A method, what takes writes, and a weight whose ``P`` is ``[[0.5, 0, 0, -1]]``."""
    method = AboveHalf()
    projection = Projection(method)
    weight = LatentWeight("w", torch.tensor([[1.0, 0.25, -0.125, -2.0]]))
    weight.parameter = nn.Parameter(weight.latent.clone())
    projection.project([weight])
    return method, ForeignWrites(method, projection), weight


def write(weight, values):
    weight.parameter.data.copy_(torch.tensor(values))


def test_where_nothing_was_written_nothing_happens(case):
    method, writes, weight = case
    writes.take(None, [weight])
    assert weight.latent.tolist() == [[1.0, 0.25, -0.125, -2.0]]
    assert not method.seen
    assert not method._fit.warned


def test_values_over_nonzero_ones_become_latent_weights(case):
    method, writes, weight = case
    write(weight, [[3.0, 0.0, 0.0, -1.0]])
    writes.take(None, [weight])
    assert weight.latent.tolist() == [[6.0, 0.25, -0.125, -2.0]], "a 0 over a 0 says nothing"
    assert weight.parameter.tolist() == [[3.0, 0.0, 0.0, -1.0]]
    assert not method.seen, "no value where there was 0"
    assert any("goes on with what other code wrote into w" in message for message in method._fit.warned)


def test_a_method_sees_which_weights_have_values_where_there_was_zero(case):
    method, writes, weight = case
    write(weight, [[0.5, 4.0, 0.0, -1.0]])
    writes.take(None, [weight])
    assert method.seen == ["w"]
    assert weight.latent.tolist() == [[1.0, 8.0, -0.125, -2.0]]


def test_a_weight_in_the_middle_of_an_update_is_left_alone(case):
    _, writes, weight = case
    write(weight, [[3.0, 0.0, 0.0, -1.0]])
    weight.effective = weight.values
    writes.take(None, [weight])
    assert weight.latent.tolist() == [[1.0, 0.25, -0.125, -2.0]]


def test_values_outside_of_a_mask_that_stays_are_lost_and_told_of(case):
    method, writes, weight = case
    weight.freeze(torch.tensor([[True, False, False, True]]))
    writes.projection.project([weight])
    write(weight, [[1.0, 4.0, 0.0, -2.0]])
    writes.take(None, [weight])
    assert weight.parameter.tolist() == [[1.0, 0.0, 0.0, -2.0]]
    assert "has set 1 values to 0" in method.warnings[0]
