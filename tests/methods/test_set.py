"""SET: an update worked out by hand."""

from by_hand import W
from helpers import attached, grid

from lightning_sparse import SET


def test_set_drops_smallest_weights_and_grows_anywhere_else():
    found = set()
    for seed in range(30):
        callback = SET(0.5, seed=seed)
        _, _, weights = attached(callback, W)
        callback.update(weights, 0.25, 1.0)
        assert grid(weights[0])[1][0] == 0, "0.1 is the smallest"
        found.add(str(grid(weights[0])))
    assert found == {
        str(mask)
        for mask in (
            [[1, 1, 1, 0], [0, 0, 1, 0]],
            [[1, 1, 0, 1], [0, 0, 1, 0]],
            [[1, 1, 0, 0], [0, 1, 1, 0]],
            [[1, 1, 0, 0], [0, 0, 1, 1]],
        )
    }
