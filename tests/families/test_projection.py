"""Projection: parameters get ``P``, which is made of the latent weights behind them."""

import torch
from torch import nn

from lightning_sparse.families.projection import Projection, keep_mask
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.joined import Joined
from lightning_sparse.weights.latent import LatentWeight


class AboveHalf:
    """All that a projection asks of a method: ``P`` is ``W`` where ``|W|`` is at least 0.5."""

    _trained = None

    def __init__(self):
        self._fit, self.calls = Fit(), 0

    def effective(self, weight, W, out):
        self.calls += 1
        return int(out.copy_(W).masked_fill_(W.abs() < 0.5, 0).count_nonzero())


def latent(values, name="w"):
    """A weight in a fit, whose parameter still holds ``W``."""
    weight = LatentWeight(name, torch.tensor(values))
    weight.parameter = nn.Parameter(weight.latent.clone())
    return weight


def test_parameters_get_the_effective_weights_and_latent_ones_stay():
    weight, method = latent([[0.9, -0.2], [0.4, -0.7]]), AboveHalf()
    Projection(method).project([weight])
    assert torch.equal(weight.parameter.data, torch.tensor([[0.9, 0.0], [0.0, -0.7]]))
    assert torch.equal(weight.latent, torch.tensor([[0.9, -0.2], [0.4, -0.7]]))


def test_what_is_written_is_noted_so_that_later_writes_of_others_are_seen():
    weight, method = latent([[0.9, -0.2]]), AboveHalf()
    Projection(method).project([weight])
    assert not method._fit.traces.differs(weight.parameter)
    with torch.no_grad():
        weight.parameter.add_(1)
    assert method._fit.traces.differs(weight.parameter)


def test_a_mask_that_stays_decides_in_place_of_the_method():
    weight, method = latent([[0.9, -0.2], [0.4, -0.7]]), AboveHalf()
    weight.freeze(torch.tensor([[False, True], [True, True]]))
    Projection(method).project([weight])
    assert torch.equal(weight.parameter.data, torch.tensor([[0.0, -0.2], [0.4, -0.7]]))
    assert not method.calls
    dP = torch.ones(2, 2)
    keep_mask(weight, dP, weight.latent)
    assert dP.tolist() == [[0, 1], [1, 1]]


def test_the_number_that_pass_is_told_and_a_new_tensor_leaves_the_parameter_alone():
    weight, projection = latent([[0.9, -0.2], [0.4, -0.7]]), Projection(AboveHalf())
    assert projection.write(weight, torch.empty(2, 2)) == 2
    assert torch.equal(projection.made(weight), torch.tensor([[0.9, 0.0], [0.0, -0.7]]))
    assert torch.equal(weight.parameter.data, weight.latent)


@torch.no_grad()
def test_weights_that_lie_together_get_what_they_get_by_themselves():
    values, others = [[0.9, -0.2], [0.4, -0.7]], [[-0.1, 0.5, 3.0]]
    alone, method = [latent(values), latent(others)], AboveHalf()
    Projection(method).project(alone)
    for write in ("project", "write_all"):
        weights = [latent(values), latent(others)]
        joined = Joined(weights, None, None)
        getattr(Projection(method), write)([joined] if write == "project" else joined)
        assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(weights, alone, strict=True))
        assert not any(method._fit.traces.differs(weight.parameter) for weight in weights)
