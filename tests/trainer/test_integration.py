"""What else a Trainer may do to a method: data without length, more epochs, averages, interruptions."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import ROUNDS, SETTINGS, Lit, effective, fit, loader, saved, seeded, trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse import DFBST, GMP, SET, GraNet, LotteryTicket, OptG, RigL, TopKAST
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules.budgets import budget


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in loader(80).dataset])


@pytest.mark.parametrize("build", [lambda: GMP(0.8), lambda: RigL(0.8), lambda: OptG(0.8), lambda: GraNet(0.8)])
def test_schedules_refuse_data_of_unknown_length_and_take_a_limit(build):
    data = DataLoader(Stream(), batch_size=8)
    with pytest.raises(MisconfigurationException, match="limit_train_batches if the data have no known length"):
        fit(build(), train=data)


def test_a_limit_on_batches_gives_data_without_length_one():
    callback = GMP(0.8, update_every=2)
    fit(callback, train=DataLoader(Stream(), batch_size=8), max_steps=20, max_epochs=-1)
    assert sum(int(mask.sum()) for mask in callback.masks.values()) == budget(0.8, 392)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_finished_schedule_is_resumed_with_more_epochs_without_growing_back(scope, tmp_path):
    def build():
        return GMP(0.8, scope=scope, update_every=3, end_at=0.5)

    _, run = fit(build(), max_epochs=1)
    saved(run, tmp_path / "one.ckpt")
    again = build()
    trainer(again, max_epochs=4).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert sum(int(mask.sum()) for mask in again.masks.values()) == budget(0.8, 392)


def test_averages_of_values_whose_places_change_are_refused():
    average = StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging would average as if they did not"):
        fit([SET(0.8, storage="sparse"), average])


def test_gains_of_weight_norm_are_not_weights():
    with pytest.warns(FutureWarning):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 4))
    callback = SET(0.8)
    fit(callback, seeded(lambda: Lit(net)), max_epochs=1)
    assert set(callback.masks) == {"net.0.weight_v", "net.2.weight"}


def test_an_interrupted_choice_of_sets_leaves_a_sparse_network(monkeypatch):
    callback, module = TopKAST(0.8, 0.5), seeded(Lit)
    choose = callback.choose

    def interrupted(*arguments):
        if callback._fit.trainer is not None and callback._fit.trainer.global_step == 5:
            raise RuntimeError("out of memory")
        choose(*arguments)

    monkeypatch.setattr(callback, "choose", interrupted)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(callback, module)
    assert sum(int((module.get_parameter(name) != 0).sum()) for name in callback.masks) <= budget(0.8, 392)


@pytest.mark.parametrize("build", [lambda: DFBST(5e-3, 0.5), lambda: RigL(0.8, update_every=7)])
def test_a_checkpoint_is_not_loaded_into_the_module_of_an_interrupted_fit(build, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 20:
                raise RuntimeError("stop")

    _, run = fit(build(), max_epochs=1)
    saved(run, tmp_path / "other.ckpt")
    callback, module = build(), seeded(Lit, 3)
    with pytest.raises(RuntimeError, match="stop"):
        fit([callback, Stop()], module)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer(callback).test(seeded(Lit, 4), loader(), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_connections_do_not_move_in_a_step_that_overflowed_elsewhere():
    callback, net = SET(0.8, update_every=5), seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    callback.attach([choice for choice in select_parameters(net) if choice.reason is None], [optimizer], False)
    (pool,) = callback._groups
    net(torch.ones(2, 12)).sum().backward()
    net[1].bias.grad[0] = float("inf")
    pool.due, before = True, callback.mask_versions
    callback.before_step(optimizer, 1.0, 1.0)
    assert pool.due
    assert all(mask is before[name] for name, mask in callback.mask_versions.items())


def test_weights_that_are_stored_transposed_train():
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    net[0].weight = nn.Parameter(net[0].weight.detach().t().contiguous().t())
    module = Lit(nn.Sequential(nn.Linear(12, 16), *net))
    fit(DFBST(5e-3, 0.5), module, max_epochs=1)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_optimizers_that_evaluate_the_loss_twice_are_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    with pytest.raises(MisconfigurationException, match="Twice, which evaluates the loss several times within a step"):
        fit(DFBST(5e-3, 0.5), seeded(lambda: Lit(optimizer=lambda p: Twice(p, lr=0.1))))


def test_optimizers_that_change_weights_outside_of_their_steps_are_refused():
    class Averaging(torch.optim.SGD):
        def train(self):
            pass

        eval = train

    def module():
        return seeded(lambda: Lit(optimizer=lambda p: Averaging(p, lr=0.1)))

    with pytest.raises(MisconfigurationException, match="Averaging, which changes weights outside of its steps"):
        fit(TopKAST(0.8, 0.5), module())
    fit(SET(0.8), module(), max_epochs=1)


@pytest.mark.parametrize("steps", [True, 3])
@pytest.mark.parametrize("method", [*SETTINGS, *ROUNDS])
def test_fast_dev_run_works_with_every_method(method, steps):
    callback = {**SETTINGS, **ROUNDS}[method]()
    run = pl.Trainer(
        fast_dev_run=steps,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = seeded(Lit)
    run.fit(module, loader())
    assert run.global_step == int(steps)
    assert effective(module, callback)
    if method in ROUNDS:
        pruned = steps == 3 or method == "ACDC"
        assert callback.sparsity == pytest.approx(0.8 if pruned else 0.0, abs=0.01)


def test_lottery_tickets_of_a_late_rewinding_have_no_round_in_fast_dev_run():
    callback = LotteryTicket(0.8, rounds=2, rewind_step=5)
    pl.Trainer(fast_dev_run=3, accelerator="cpu", enable_progress_bar=False, callbacks=[callback]).fit(
        seeded(Lit), loader()
    )
    assert callback.density == 1
