"""SNFS: its momentum and the shares of layers, worked out by hand."""

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
