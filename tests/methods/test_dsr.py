"""DSR: its one threshold and the shares of layers, worked out by hand."""

import lightning.pytorch as pl
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
