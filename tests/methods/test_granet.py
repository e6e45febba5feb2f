"""GraNet: prunes globally, then regenerates."""

from by_hand import graded
from helpers import attached, grid, watched

from lightning_sparse import GraNet


def test_granet_prunes_globally_then_regenerates_by_gradient(monkeypatch):
    callback = GraNet(0.5, initial_sparsity=0.0, drop_fraction=0.5, update_every=2)
    monkeypatch.setattr(GraNet, "total_steps", 8.0)
    module, pool, weights = attached(
        callback, {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.9, -0.4, 0.0]], "b": [[1.0, 0.3], [0.2, 0.0]]}
    )
    graded(module, {"a": [[0.0, 9.0, -3.0, 1.0], [9.0, 2.0, 9.0, -4.0]], "b": [[0.0, 0.0], [0.0, 1.0]]})
    pool.values["start"], pool.step = 8, 4  # the schedule ends: half of 12
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    # 0.1 and 0.2 are pruned (of -0.2 and 0.2 the earlier stays); at half of the training the fraction is 0.25: in a 1
    # of 4 goes, -0.2, and -4 comes, 9 being pruned just now; in b none of 2
    assert callback.target_count(pool) == 6
    assert grid(weights[0]) == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert grid(weights[1]) == [[1, 1], [0, 0]]
    pool.values["start"], pool.step = 6, 2  # nothing to prune, the fraction is 0.43
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 1, 0, 0], [0, 1, 1, 0]], "the new 0 goes, the first 9 comes"
    assert grid(weights[1]) == [[1, 1], [0, 0]]


def test_granet_does_not_grow_what_it_has_just_pruned(monkeypatch):
    callback = GraNet(0.5, initial_sparsity=0.0, drop_fraction=1.0, update_every=2)
    monkeypatch.setattr(GraNet, "total_steps", 8.0)
    module, pool, weights = attached(callback, {"a": [[4.0, 3.0, 2.0, 1.0]]})
    graded(module, {"a": [[0.0, 0.0, 0.0, 9.0]]})
    pool.step = 4
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 1, 0, 0]]


def test_granet_uniform_brings_every_layer_to_the_same_sparsity():
    callback = GraNet(0.75, initial_sparsity=0.5, scope="layer", distribution="uniform", update_every=3)
    watch, _, _ = watched(callback)
    sizes = [mask.numel() for mask in callback.masks.values()]
    assert watch.counts[0] == [size // 2 for size in sizes]
    assert watch.counts[-1] == [size // 4 for size in sizes]
    assert watch.moves > 1
