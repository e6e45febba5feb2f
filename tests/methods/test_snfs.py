"""SNFS: its momentum and the shares of layers, worked out by hand."""

import pytest
import torch
from by_hand import TWO, W, graded
from helpers import attached, grid

from lightning_sparse import SNFS


def test_snfs_averages_gradients_over_all_steps_without_their_scale():
    callback = SNFS(0.5, smoothing=0.75)
    module, _, weights = attached(callback, W)
    graded(module, {"a": [[32.0] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[1.0] * 4] * 2
    graded(module, {"a": [[0.0] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[0.75] * 4] * 2
    graded(module, {"a": [[float("inf")] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[0.75] * 4] * 2, "AMP skips this step"


def test_snfs_shares_connections_in_proportion_to_the_mean_momentum():
    callback = SNFS(0.5)
    _, _, weights = attached(callback, {"a": TWO["a"], "b": [[1.0, 0.3, 0.0], [0.2, -0.1, 0.0]]})
    # mean |momentum| over active ones: a 0.5, b 1.5
    weights[0].buffers["momentum"] = torch.tensor([[0.5, 0.5, -2.0, 1.0], [0.5, 9.0, -0.5, 3.0]])
    weights[1].buffers["momentum"] = torch.tensor([[1.5, 1.5, 4.0], [-1.5, 1.5, -5.0]])
    # half of 4 and 4 goes; of the 4, a should have 1 and b 3, but b has room for 2: so a has 2
    callback.update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert grid(weights[1]) == [[1, 1, 1], [0, 0, 1]]


def test_snfs_takes_connections_from_a_dense_layer():
    callback = SNFS(0.5)
    _, _, weights = attached(callback, TWO)
    weights[0].buffers["momentum"] = torch.ones(2, 4)
    weights[1].buffers["momentum"] = torch.ones(2, 2)
    callback.update(weights, 0.25, 1.0)  # 1 of each; b has no free place but the one just left
    assert [weight.num_active for weight in weights] == [5, 3]


def momenta(weights, *claims):
    for weight, claim in zip(weights, claims, strict=True):
        weight.buffers["momentum"] = torch.full(weight.shape, claim)


def test_a_dense_layer_with_the_largest_claim_stays_dense():
    callback = SNFS(0.5)
    _, _, weights = attached(callback, TWO)
    momenta(weights, 1.0, 3.0)
    for _ in range(3):
        callback.update(weights, 0.5, 1.0)
        assert [weight.num_active for weight in weights] == [4, 4]


@pytest.mark.parametrize(
    ("zeros", "claim", "drops"),
    [
        (3, 3.0, 2),  # 15 % of 17
        (3, 1.0, 8),  # it claims less than an even share
        (3, 2.0, 8),  # just an even share
        (4, 3.0, 8),  # not nearly dense any more: a fifth is 0
        (1, 3.0, 0),  # 5 % of 19
    ],
)
def test_a_nearly_dense_layer_that_claims_more_than_an_even_share_drops_no_more_than_its_share_of_zeros(
    zeros, claim, drops
):
    callback = SNFS(0.5)
    row = [[0.0] * zeros + [1.0] * (20 - zeros)]
    _, _, weights = attached(callback, {"a": row, "b": [[1.0] * 10 + [0.0] * 30]})
    momenta(weights, claim, 2.0)
    assert callback.drop_counts(weights, 0.5) == [drops, 5]
