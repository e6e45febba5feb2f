"""MEST: its score by hand, and the soft bound."""

import pytest
from by_hand import W, graded
from helpers import StopsAfter, attached, fit, grid, loader, watched

from lightning_sparse import MEST

# ---------------------------------------------------------------------- worked out by hand


def test_mest_drops_by_magnitude_and_gradient_without_its_scale():
    callback = MEST(0.5, gradient_weight=0.5)
    module, _, weights = attached(callback, W)
    graded(module, {"a": [[0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]]})
    # |W| + 0.5 |dP| / 4 : 0.5 0.2 / 1.1 0.4
    callback.update(weights, 0.25, 4.0)
    assert weights[0].num_active == 4
    assert grid(weights[0])[0][:2] == [1, 0]
    assert [grid(weights[0])[1][i] for i in (0, 2)] == [1, 1]


# ---------------------------------------------------------------------- the authors' schedule


def test_mests_authors_move_20_percent_then_10_and_from_epoch_120_of_160_on_none(monkeypatch):
    batches = 782
    callback = MEST(0.9, drop_fraction=0.2, decay="halving", stop_at=0.75, update_every=5 * batches)
    monkeypatch.setattr(MEST, "total_steps", 160.0 * batches)
    _, group, _ = attached(callback, W)
    moved = {}
    for epoch in range(160):
        group.step = epoch * batches
        if callback.is_due(group):
            moved[epoch] = callback.fraction(group)
    assert [*moved] == [*range(5, 120, 5)]
    assert all(share == (0.2 if epoch < 90 else 0.1) for epoch, share in moved.items())


def test_the_soft_bound_of_mests_authors_is_50_percent_then_25_and_none_at_the_end(monkeypatch):
    callback = MEST(0.5, drop_fraction=0.5, soft_bound=True, decay="halving", stop_at=0.75, update_every=5)
    monkeypatch.setattr(MEST, "total_steps", 160.0)
    active = [[1.0] * 40 + [0.0] * 360]
    _, group, (weight,) = attached(callback, {"a": active})
    above = []
    for group.step in range(160):
        if callback.is_due(group):
            callback.move([weight], group, 1.0)
            above.append((group.step, weight.num_active - 40))
    assert [more for step, more in above if step < 90] == [20] * 17
    assert [more for step, more in above if 90 <= step < 120] == [10] * 6
    assert above[-1] == (120, 0)


# ---------------------------------------------------------------------- ITOP, MEST, DeepR


@pytest.mark.parametrize(("update_every", "stop_at"), [(3, 1.0), (4, 0.75), (None, 0.5), (None, 1.0), (5, 0.6)])
def test_mests_soft_bound_has_more_between_updates_and_the_budget_at_the_end(update_every, stop_at):
    callback = MEST(0.9, soft_bound=True, update_every=update_every, stop_at=stop_at, decay="none")
    watch, _, _ = watched(callback, batches=7, max_epochs=4)
    totals = [sum(counts) for counts in watch.counts]
    K = 392 - round(0.9 * 392)
    assert totals[0] == totals[-1] == K
    more = sum(int(0.3 * n + 1e-6) for n in watch.counts[0])
    assert set(totals) == {K, K + more}
    assert watch.counts[0] == watch.counts[-1]


def test_mest_tells_of_a_training_that_ended_above_the_budget():
    callback = MEST(0.9, soft_bound=True, update_every=3)
    with pytest.warns(UserWarning, match=r"MEST.* has \d+ active weights above its budget"):
        fit([callback, StopsAfter()], train=loader(80), max_epochs=4)
