"""Methods that prune bit by bit: the schedule by hand, and an end at the target exactly."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import NETS, Lit, StopsAfter, Watch, attached, fit, grid, loader, mlp, seeded, trainer, watched
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import GMP, MEST, GraNet, OptG, RigL
from lightning_sparse.rules.budgets import layer_counts

SIZE = 392


def totals(watch):
    return [sum(counts) for counts in watch.counts]


def test_gmp_follows_the_cubic_schedule():
    watch, _, _ = watched(GMP(0.9, begin_at=0.2, end_at=0.8, update_every=4), batches=20)
    # from 392 after step 4 to 39 at step 16, with (1 - 1/3)^3 and (1 - 2/3)^3 of 353 more left at steps 8 and 12
    assert totals(watch) == [392] * 8 + [39 + round(353 * 8 / 27)] * 4 + [39 + round(353 / 27)] * 4 + [39] * 4


W = {"a": [[0.5, -0.2, 0.05, 0.6], [0.1, 0.7, -0.4, 0.8]], "b": [[1.0, 0.3], [0.01, -0.2]]}


def test_gmp_compares_the_weights_of_all_layers(monkeypatch):
    monkeypatch.setattr(GMP, "total_steps", 8.0)
    callback = GMP(0.5)
    _, pool, weights = attached(callback, W)
    pool.step = 6
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 0, 0, 1], [0, 1, 1, 1]]
    assert grid(weights[1]) == [[1, 0], [0, 0]]


def test_gmp_by_layer_prunes_each_to_its_own_count(monkeypatch):
    monkeypatch.setattr(GMP, "total_steps", 8.0)
    callback = GMP(0.5, scope="layer")
    _, pool, weights = attached(callback, W)
    pool.step = 3  # half of the schedule: an eighth of 6 is left, shared 4 : 2
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    assert [weight.num_active for weight in weights] == [5, 2]
    pool.step = 6
    callback.plan(pool)
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert grid(weights[1]) == [[1, 1], [0, 0]]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_gmp_ends_at_the_target_and_nothing_comes_back(net, sparsity, scope):
    callback = GMP(sparsity, scope=scope, update_every=4)
    watch, _, _ = watched(callback, NETS[net], batches=14)
    size = sum(mask.numel() for mask in callback.masks.values())
    assert totals(watch)[0] == size
    assert totals(watch)[-1] == size - round(sparsity * size)
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert all(not (after[name] & ~mask).any() for name, mask in before.items())


@pytest.mark.parametrize("method", [GMP, GraNet])
@pytest.mark.parametrize(
    ("batches", "epochs", "every", "begin", "end"),
    [
        (1, 1, 1, 0.0, 1.0),
        (2, 1, 100, 0.0, 0.5),
        (7, 1, 3, 0.0, 1.0),
        (7, 3, 4, 0.3, 0.61),
        (10, 2, 7, 0.5, 1.0),
        (13, 1, 13, 0.9, 1.0),
        (9, 1, 2, 0.0, 0.01),
    ],
)
@pytest.mark.filterwarnings("ignore:.*will prune all at once")
def test_the_last_update_falls_on_the_end_whatever_the_length(method, batches, epochs, every, begin, end):
    callback = method(0.87, initial_sparsity=0.0, begin_at=begin, end_at=end, update_every=every)
    watch, _, _ = watched(callback, batches=batches, max_epochs=epochs)
    steps = batches * epochs
    assert totals(watch)[-1] == SIZE - round(0.87 * SIZE)
    reached = totals(watch).index(totals(watch)[-1])
    assert reached <= min(-int(-end * steps // 1), steps - 1) + 1


@pytest.mark.parametrize("kwargs", [{"max_steps": 11, "max_epochs": -1}, {"accumulate_grad_batches": 4}])
def test_gmp_ends_at_the_target_by_steps_and_with_accumulation(kwargs):
    watch, _, _ = watched(GMP(0.9, end_at=1.0, update_every=3), batches=10, **{"max_epochs": 3, **kwargs})
    assert totals(watch)[-1] == 39


def test_gmp_by_layer_ends_with_the_counts_of_its_distribution():
    for distribution in ("uniform", "erk"):
        callback = GMP(0.83, scope="layer", distribution=distribution, update_every=2)
        watched(callback)
        shapes = {name: tuple(mask.shape) for name, mask in callback.masks.items()}
        counts = {name: int(mask.sum()) for name, mask in callback.masks.items()}
        assert counts == layer_counts(distribution, shapes, SIZE - round(0.83 * SIZE))


@pytest.mark.parametrize("method", [GMP, GraNet])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_no_layer_falls_below_min_layer_density(method, initial):
    callback = method(0.9, initial_sparsity=initial, min_layer_density=0.09, update_every=2)
    module = seeded(lambda: Lit(mlp()))
    module.net[0].weight.data.mul_(1e-3)  # would be pruned first
    fit(callback, module, loader(96), max_epochs=1)
    assert callback.density == 39 / SIZE
    assert callback.layer_density["net.0.weight"] >= 0.09


@pytest.mark.parametrize("net", NETS)
def test_granet_begins_sparse_regrows_and_ends_at_the_target(net):
    callback = GraNet(0.8, update_every=2)
    watch, _, _ = watched(callback, NETS[net], batches=24)
    size = sum(mask.numel() for mask in callback.masks.values())
    assert totals(watch)[0] == size - round(0.5 * size)
    assert totals(watch) == sorted(totals(watch), reverse=True)
    assert totals(watch)[13:] == [size - round(0.8 * size)] * 11
    pairs = list(zip(watch.masks, watch.masks[1:], strict=False))
    came_back = [any((b[n] & ~m).any() for n, m in a.items()) for a, b in pairs]
    assert any(came_back[:12])
    assert any(came_back[13:]), "it regenerates after the schedule's end, too"


def test_a_layer_pruned_away_is_named_and_the_rest_meets_the_target():
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    module.net[2].weight.data.mul_(1e-6)
    callback = GMP(0.8, update_every=2)
    with pytest.warns(UserWarning, match=r"net\.2\.weight has no weight left: density 0 after epoch 0"):
        fit(callback, module, loader(80), max_epochs=1)
    assert callback.density == 78 / SIZE


@pytest.mark.parametrize(
    "build", [lambda: GMP(0.9, update_every=3), lambda: RigL(0.9, update_every=3), lambda: OptG(0.9)]
)
def test_a_second_fit_of_a_trainer_has_a_schedule_of_its_own_length(build, tmp_path):
    class Totals(pl.Callback):
        def on_train_batch_end(self, run, module, *args):
            planned.append(run.callbacks[0].total_steps)
            if run.current_epoch == 3:
                run.save_checkpoint(tmp_path / "second.ckpt")

    planned, module = [], seeded(Lit)
    run = trainer([build(), Totals()], max_epochs=2)
    run.fit(module, loader())
    assert planned == [60] * 60
    run.fit_loop.max_epochs = 5
    run.fit(module, loader(80))
    assert planned[60:] == [30] * 30, "three epochs of ten batches"
    trainer([build(), Totals()], max_epochs=5).fit(seeded(Lit), loader(80), ckpt_path=tmp_path / "second.ckpt")
    assert planned[90:] == [30] * 10


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_length_of_a_second_fit_is_that_of_max_steps(accumulate):
    method = RigL(0.9, update_every=3)
    run = trainer(
        [LearningRateFinder(num_training_steps=5), method],
        max_steps=10,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
    )
    module = seeded(Lit)
    module.lr = 0.1
    run.fit(module, loader())
    run.fit_loop.epoch_loop.max_steps = 25
    planned = []
    method.on_train_end = lambda *args: planned.append(method.total_steps)
    run.fit(module, loader())
    assert run.global_step == 25
    assert planned == [15]


def test_weights_unfrozen_after_the_end_join_the_target():
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                module.net[2].weight.requires_grad_(True)

    module = seeded(Lit)
    module.net[2].weight.requires_grad_(False)
    callback = GMP(0.8, update_every=2, end_at=0.5)
    fit([callback, Unfreeze()], module, loader(80), max_epochs=3)
    assert callback.density == 78 / SIZE


def test_gmp_resumes_in_the_middle_of_its_schedule(tmp_path):
    def build():
        return GMP(0.9, update_every=3, end_at=0.9)

    whole, first, second = build(), build(), build()
    fit(whole, seeded(Lit), loader(80), max_epochs=2)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit([first, Save()], seeded(Lit), loader(80), max_epochs=2)
    run = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[second],
    )  # fmt: skip
    run.fit(Lit(), loader(80), ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(mask, second.masks[name]) for name, mask in whole.masks.items())


class Shrinks(Lit):
    """Its first epoch has 40 batches, the others 5 each: the training becomes shorter than it was planned."""

    def train_dataloader(self):
        return loader(320 if self.trainer.current_epoch == 0 else 40)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GMP(0.9, update_every=3),
        lambda: GMP(0.9, scope="layer", update_every=3),
        lambda: GraNet(0.9, update_every=3),
        lambda: OptG(0.9, update_every=20),
        lambda: MEST(0.9, soft_bound=True, update_every=3),
    ],
)
def test_in_a_training_that_became_shorter_the_step_after_the_end_prunes_to_the_target(build):
    watch = Watch(build())
    run = trainer([watch.callback, watch], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    run.fit(seeded(Shrinks))
    counts = totals(watch)
    assert len(counts) == 55
    assert counts[39] > 39, "of 160 steps planned 40 are made"
    assert set(counts[40:]) == {39}, "20 steps are planned, and 40 are made"


# ---------------------------------------------------------------------- what is told


def test_a_training_that_ends_before_the_schedule_is_told():
    with pytest.warns(
        UserWarning, match=r"GMP.* has \d+ active weights, not 39: the training ended after 10 steps of 40"
    ):
        fit([GMP(0.9, update_every=3), StopsAfter()], train=loader(80), max_epochs=4)


def test_a_training_too_short_for_a_schedule_is_told():
    with pytest.warns(UserWarning, match=r"GMP.* will prune all at once: begin_at and end_at are 8 steps apart"):
        watched(GMP(0.9, update_every=100), batches=10)


def test_a_training_without_end_is_refused():
    with pytest.raises(MisconfigurationException, match=r"GraNet.* must know how long the training is"):
        watched(GraNet(0.9), max_epochs=-1)


def test_layers_that_must_keep_more_than_the_target_are_refused():
    with pytest.raises(ValueError, match=r"min_layer_density=0\.2 alone takes \d+ weights, the budget is \d+"):
        watched(GMP(0.9, min_layer_density=0.2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GMP(0.9, scope="model"), r"scope must be one of \['global', 'layer'\], got 'model'"),
        (lambda: GMP(0.9, begin_at=0.5, end_at=0.5), r"begin_at must be below end_at=0\.5, got 0\.5"),
        (lambda: GMP(0.9, end_at=1.5), r"end_at must be a number from 0 to 1, got 1\.5"),
        (lambda: GMP(0.9, initial_sparsity=0.95), r"initial_sparsity must be at most sparsity=0\.9, got 0\.95"),
        (lambda: GMP(0.9, update_every=0), r"update_every must be an integer of at least 1, got 0"),
        (lambda: GMP(1.0), r"sparsity must be below 1"),
        (lambda: GraNet(0.9, drop_fraction=0), r"drop_fraction must be above 0, got 0.*GMP"),
        (lambda: GraNet(0.9, drop_fraction=2), r"drop_fraction must be a number from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
