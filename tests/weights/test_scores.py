import pytest
import torch
from torch import nn

from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.scores import TrainedScores, zeros


@pytest.mark.parametrize("maximize", [False, True])
def test_scores_take_a_step_of_plain_sgd_and_count_what_is_not_finite_as_0(maximize):
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    optimizer = torch.optim.Adam([parameter], lr=0.5, maximize=maximize)
    weight = LatentWeight("w", parameter.detach().clone(), {"S": zeros(parameter.detach())})
    weight.parameter = parameter
    parameter.grad = torch.tensor([[2.0, 1.0], [torch.inf, 0.0]])
    trained = TrainedScores("S")
    trained.note([weight], 0.1)
    trained.descend(optimizer, [weight])
    sign = 1 if maximize else -1
    torch.testing.assert_close(weight.buffers["S"], sign * 0.5 * 0.1 * torch.tensor([[2.0, -2.0], [0.0, 0.0]]))
