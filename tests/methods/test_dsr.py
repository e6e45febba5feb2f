"""DSR: its one threshold and the shares of layers, worked out by hand."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from by_hand import TWO, W
from helpers import Lit, attached, data, grid, watched
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DSR

# ---------------------------------------------------------------------- worked out by hand


def test_dsr_drops_below_one_threshold_and_shares_by_survivors():
    callback = DSR(0.5, drop_fraction=0.5, init_threshold=0.25, stop_at=1.0, update_every=1)
    four = [[1.0, -0.3, 0.2, 0.3], [0.0] * 4]
    _, pool, weights = attached(callback, {"a": TWO["a"], "b": four})
    callback.fraction = lambda pool: 0.5
    callback.move(weights, pool, 1.0)
    # below 0.25: 2 of a, 1 of b: 3 where 4 was the target; survivors 2 and 3: of 3, 1.2 and 1.8
    assert [weight.num_active for weight in weights] == [3, 5]
    assert grid(weights[0])[0][:2] == [1, 0]
    assert grid(weights[0])[1][0] == 0
    assert grid(weights[1])[0] == [1, 1, 0, 1]
    assert pool.values == {"threshold": 0.5}
    assert callback.threshold == 0.5


def test_dsr_halves_its_threshold_when_too_many_were_dropped():
    callback = DSR(0.5, init_threshold=0.25)
    _, pool, weights = attached(callback, W)
    callback.fraction = lambda pool: 0.25
    callback.move(weights, pool, 1.0)
    assert pool.values == {"threshold": 0.125}


def test_a_layer_below_the_threshold_keeps_its_largest_connection_and_can_grow():
    callback = DSR(0.5, init_threshold=0.25)
    small = [[0.01, -0.2, 0.02, 0.0], [0.1, 0.0, 0.0, 0.0]]
    _, pool, weights = attached(callback, {"a": small, "b": [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]})
    callback.fraction = lambda pool: 0.5
    callback.move(weights, pool, 1.0)
    # 3 go, and are shared out by the survivors: 1 of a, 3 of b
    assert [weight.num_active for weight in weights] == [2, 5]
    assert weights[0].mask[0, 1]
    assert not weights[0].mask[[0, 0, 1], [0, 2, 0]].any()


def test_a_layer_without_connections_gets_none():
    callback = DSR(0.5, init_threshold=0.25)
    _, pool, weights = attached(callback, {"a": [[0.0] * 4], "b": [[1.0, 0.1, 0.0, 0.0]]})
    callback.fraction = lambda pool: 0.5
    callback.move(weights, pool, 1.0)
    assert [weight.num_active for weight in weights] == [0, 2]


# ---------------------------------------------------------------------- when


def test_the_authors_interval_grows_from_100_to_800_steps(monkeypatch):
    """Their program reads it off a table at each epoch, and stops after epoch 190 of 200."""
    monkeypatch.setattr(DSR, "total_steps", 200 * 391.0)
    clock = DSR(0.9, update_every=100, double_interval_at=[0.125, 0.4, 0.7], stop_at=0.95).clock
    period = {0: 100, 25: 200, 80: 400, 140: 800}
    theirs = [i for i in range(1, 190 * 391) if i % period[max(epoch for epoch in period if epoch <= i // 391)] == 0]
    assert [step for step in range(200 * 391) if clock.is_due(step)] == theirs


@pytest.mark.parametrize(
    ("every", "batches", "epochs", "moves"), [(2, 40, 1, [2, 4, 8, 12, 16, 24]), (None, 1, 16, [1, 2, 4, 8])]
)
def test_the_interval_doubles_within_a_fit(every, batches, epochs, moves):
    callback = DSR(0.5, init_threshold=0.1, update_every=every, stop_at=0.75, double_interval_at=[0.12, 0.36])
    watch, _, _ = watched(callback, batches=batches, max_epochs=epochs)
    moved = [
        step for step, (a, b) in enumerate(pairwise(watch.masks), 1) if any(not torch.equal(a[n], b[n]) for n in a)
    ]
    assert moved == moves


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (0.5, r"double_interval_at must be a list of numbers, got 0\.5\. The authors' is \[0\.125, 0\.4, 0\.7\]"),
        (None, r"double_interval_at must be a list of numbers, got None"),
        ([0.5, 1.5], r"double_interval_at must be a number from 0 to 1, got 1\.5"),
        ([0], r"double_interval_at must be above 0, got 0"),
    ],
)
def test_bad_shares_are_refused(shares, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DSR(0.9, double_interval_at=shares)


# ---------------------------------------------------------------------- state and arguments


def test_dsrs_threshold_travels_with_the_checkpoint(tmp_path):
    callback, other = (DSR(0.8, init_threshold=1e-6, update_every=3, stop_at=1.0) for _ in range(2))
    _, _, run = watched(callback)
    assert callback.threshold == 1e-6 * 2**3
    run.save_checkpoint(tmp_path / "a.ckpt")
    seen = []

    class Read(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(other.threshold)

    x, y = data(96)
    train = DataLoader(TensorDataset(x, y), batch_size=8)
    again = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[other, Read()],
    )  # fmt: skip
    again.fit(Lit(), train, ckpt_path=tmp_path / "a.ckpt")
    assert seen == [callback.threshold]
    assert other.threshold > callback.threshold
