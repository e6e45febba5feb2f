"""How often connections move: the paper's interval, or a shorter one in a short training; and what is told of it."""

import logging

import pytest
from helpers import Lit, fit, loader, seeded, trainer, watched

from lightning_sparse import DSR, GGR, GMP, ITOP, MEST, SET, SNFS, GraNet, MemoryEfficientDST, RigL
from lightning_sparse.rules.clock import UPDATES, Clock, interval


@pytest.mark.parametrize(
    ("paper", "ticks", "expected"),
    [(100, 75_000, 100), (100, 1100, 100), (100, 1099, 99), (1000, 300, 27), (100, 11, 1), (100, 3, 1)],
)
def test_the_interval_is_the_papers_or_leaves_ten_updates(paper, ticks, expected):
    assert interval(paper, ticks) == expected
    updates = len([tick for tick in range(ticks) if Clock(expected, end=ticks).is_due(tick)])
    assert updates >= min(UPDATES, ticks - 1)


def test_a_training_of_unknown_length_has_the_papers_interval():
    assert interval(100, float("inf")) == 100


@pytest.mark.parametrize(
    "clock", [Clock(3, end=10), Clock(3, end=10, closing=10), Clock(4, end=9.5, begin=2, closing=8), Clock(20, end=10)]
)
def test_ticks_are_those_at_which_connections_are_due(clock):
    assert list(clock.ticks(30)) == [tick for tick in range(31) if clock.is_due(tick)]


@pytest.mark.parametrize("method", [RigL, SET, SNFS, DSR, ITOP, MEST, GGR, MemoryEfficientDST])
def test_by_default_a_short_training_has_ten_updates_at_least(method):
    watch, _, _ = watched(method(0.5, decay="none"), batches=60)
    assert UPDATES <= watch.moves <= 2 * UPDATES


@pytest.mark.parametrize("method", [SET, SNFS, MEST])
def test_a_method_of_epochs_moves_once_an_epoch_where_there_are_enough(method):
    watch, _, _ = watched(method(0.5, decay="none"), batches=4, max_epochs=2 * UPDATES)
    changed = [step for step in range(1, len(watch.masks)) if _differ(watch.masks[step - 1], watch.masks[step])]
    assert changed
    assert all(step % 4 == 0 for step in changed)


def _differ(a, b):
    return any(not mask.equal(b[name]) for name, mask in a.items())


@pytest.mark.parametrize("method", [GMP, GraNet])
def test_by_default_a_short_schedule_prunes_ten_times_at_least(method):
    callback = method(0.8)
    watch, _, _ = watched(callback, batches=80)
    assert len({sum(counts) for counts in watch.counts}) >= UPDATES
    assert sum(watch.counts[-1]) == 392 - round(0.8 * 392)


def test_a_number_of_steps_and_once_an_epoch_are_taken_as_they_are():
    assert watched(SET(0.5, update_every=None, decay="none"), batches=4, max_epochs=3)[0].moves == 2
    assert watched(RigL(0.5, update_every=4, stop_at=1.0, decay="none"), batches=13)[0].moves == 3


def test_the_plan_is_told_when_training_starts(caplog):
    with caplog.at_level(logging.INFO):
        watched(RigL(0.9, update_every=2, stop_at=1.0), batches=12)
    assert "net.0.weight  Linear  16 x 12  0.08333  sparse" in caplog.text
    plan = next(r.message for r in caplog.records if "moves connections" in r.message)
    # 30 % times (1 + cos(pi t / 12)) / 2 at t = 2, 4, 6, 8, 10
    shares = "28.0% of them at first, 2.0% at last, 0.75 times all in sum"
    assert plan == (
        "RigL(sparsity=0.9, update_every=2, stop_at=1.0) moves connections 5 times, every 2 steps from step 2 to 10: "
        f"{shares}."
    )


def test_the_plan_of_epochs_and_of_pruning_is_told(caplog):
    with caplog.at_level(logging.INFO):
        watched(SET(0.9, update_every=None, decay="none"), batches=2, max_epochs=7)
        watched(GMP(0.9, scope="layer", update_every=2, end_at=0.8), batches=15)
    assert "moves connections 6 times, every epoch from epoch 1 to 6: 30.0% of them at first, 30.0% at" in caplog.text
    assert "prunes 6 times, every 2 steps from step 2 to 12, to density 0.1 in all" in caplog.text
    assert "net.0.weight  Linear  16 x 12  0.09896  sparse" in caplog.text  # 19 of 192


def test_a_single_move_is_told_as_one(caplog):
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="will move connections only once: "):
        watched(RigL(0.5, update_every=3, stop_at=1.0, decay="none"), batches=6)
    assert "moves connections once, at step 3: 30.0% of them." in caplog.text


def test_a_resumed_run_tells_what_is_to_come(caplog, tmp_path):
    _, run = fit(RigL(0.5, update_every=2, stop_at=1.0), train=loader(48), max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert run.global_step == 6
    assert "to come" not in caplog.text
    with caplog.at_level(logging.INFO):
        longer = trainer(RigL(0.5, update_every=2, stop_at=1.0), max_epochs=2)
        longer.fit(seeded(Lit), loader(48), ckpt_path=tmp_path / "last.ckpt")
    assert "5 times, every 2 steps from step 2 to 10: " in caplog.text
    assert "It goes on from step 6: 3 of these moves are to come." in caplog.text


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (RigL(0.5, update_every=3, stop_at=1.0), r"will move connections only 3 times: the training is too short"),
        (SET(0.5, update_every=None), r"will move no connection: the training is too short.*Lower update_every"),
        (
            GMP(0.5, update_every=4),
            r"will prune only 3 times: begin_at and end_at are 9 steps apart.*Lower update_every",
        ),
    ],
)
def test_fewer_than_five_updates_are_warned_of(callback, message):
    with pytest.warns(UserWarning, match=message):
        fit(callback, seeded(Lit), loader(96), max_epochs=1)


@pytest.mark.parametrize("value", ["often", 0, True, 2.5])
def test_other_intervals_are_refused(value):
    with pytest.raises(ValueError, match=r"update_every must be an integer of at least 1, got .*'auto' takes"):
        RigL(0.9, update_every=value)
