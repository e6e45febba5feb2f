"""RigL: an update worked out by hand."""

import torch
from by_hand import DP, W, graded
from helpers import attached, grid

from lightning_sparse import RigL


def test_rigl_drops_smallest_weights_and_grows_largest_gradients_among_the_others():
    module, _, weights = attached(RigL(0.5), W)
    graded(module, DP)
    weights[0].optimizer.state[module["a"]]["momentum_buffer"] = torch.ones(2, 4)
    RigL(0.5).update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(module["a"].data, torch.tensor([[0.5, 0, 0, 0], [0, 0, -0.4, 0]]))
    momentum = weights[0].optimizer.state[module["a"]]["momentum_buffer"]
    assert momentum.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]], "fresh for the dropped and the grown alone"
