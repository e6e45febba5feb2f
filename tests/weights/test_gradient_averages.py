"""An exponential average of the dense gradient beside each masked weight."""

import torch
from helpers import attached

from lightning_sparse import SNFS
from lightning_sparse.weights import gradient_averages


def weight_with(average):
    _, _, (weight,) = attached(SNFS(0.5), {"w": [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]})
    weight.buffers["momentum"] = torch.tensor(average)
    return weight


def test_it_begins_at_zero_in_single_precision_at_least():
    weight = weight_with([[0.0] * 3] * 2)
    assert torch.equal(gradient_averages.start(weight), torch.zeros(2, 3))


def test_it_keeps_a_share_of_its_past_and_takes_the_loss_scale_away():
    weight = weight_with([[1.0] * 3] * 2)
    weight.parameter.grad = torch.full((2, 3), 8.0)
    gradient_averages.update_([weight], "momentum", smoothing=0.75, scale=4.0)
    assert torch.equal(weight.buffers["momentum"], torch.full((2, 3), 1.25))


def test_the_mean_is_that_of_the_active_connections():
    weight = weight_with([[1.0, 9.0, -2.0], [9.0, 6.0, 9.0]])
    assert gradient_averages.mean_of_connections(weight, "momentum") == 3


def test_the_largest_are_found_among_inactive_connections_alone_whatever_their_sign():
    weight = weight_with([[9.0, 1.0, 9.0], [-3.0, 9.0, 2.0]])
    assert gradient_averages.largest_inactive(weight, "momentum", 2).tolist() == [3, 5]
