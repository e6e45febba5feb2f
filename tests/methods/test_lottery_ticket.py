"""LotteryTicket: rounds of one fit, exact counts, and a rewinding that leaves nothing behind."""

import copy
import functools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAINLY, Lit, StopsAfter, cnn, data, effective, fit, loader, same, saved, seeded, state, trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import LotteryTicket
from lightning_sparse.trainer.rewind import _load
from lightning_sparse.zoo.models.lr_schedules import WarmupCosineLR, WarmupMultiStepLR


def step_lr(optimizer):
    return StepLR(optimizer, 1, 0.5)


class Looks(pl.Callback):
    """Keep what each epoch starts and ends with."""

    def __init__(self, callback):
        self.callback, self.starts, self.ends = callback, [], []

    def look(self, trainer, module):
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {
            "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "masks": dict(self.callback.masks),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "momentum": {
                name: s["momentum_buffer"].clone()
                for name, p in module.named_parameters()
                if "momentum_buffer" in (s := trainer.optimizers[0].state.get(p, {}))
            },
        }

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.starts.append(self.look(trainer, module))

    def on_train_epoch_end(self, trainer, module):
        self.ends.append(self.look(trainer, module))


def train(callback, epochs, build=lambda: Lit(cnn(), scheduler=step_lr), **kwargs):
    looks = Looks(callback)
    module, run = fit([callback, looks], seeded(build), max_epochs=epochs, **kwargs)
    return module, run, looks


def masked(look, masks):
    return {name: x * masks[name] if name in masks else x for name, x in look["tensors"].items()}


def test_each_round_starts_from_the_very_same_surviving_values():
    """Parameters, batch-norm statistics, learning rates; and no momentum."""
    callback = LotteryTicket(0.8, rounds=3)
    module, _, looks = train(callback, 8)
    for start in range(2, 8, 2):
        now = looks.starts[start]
        assert now["tensors"].keys() == looks.starts[0]["tensors"].keys()
        assert "net.5.running_mean" in now["tensors"]
        assert same(now["tensors"], masked(looks.starts[0], now["masks"]))
        assert now["momentum"] == {}
        assert now["lr"] == 0.1
    assert [look["lr"] for look in looks.starts] == [0.1, 0.05] * 4
    assert effective(module, callback)


def test_each_round_prunes_the_smallest_of_what_it_trained_and_the_counts_are_exact():
    callback = LotteryTicket(0.9, rounds=3)
    _, _, looks = train(callback, 4, Lit)
    counts = [sum(int(m.sum()) for m in look["masks"].values()) for look in looks.ends]
    final = 392 - round(0.9 * 392)
    assert counts == [392, round(392 * (final / 392) ** (1 / 3)), round(392 * (final / 392) ** (2 / 3)), final]
    for end, start in zip(looks.ends, looks.starts[1:], strict=False):
        before, after = (torch.cat([m.flatten() for m in look["masks"].values()]) for look in (end, start))
        W = torch.cat([end["tensors"][name].abs().flatten() for name in end["masks"]])
        assert not (after & ~before).any()
        assert W[after].min() >= W[before & ~after].max()


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_by_layer_each_has_its_own_count(distribution):
    callback = LotteryTicket(0.75, rounds=2, scope="layer", distribution=distribution, min_layer_density=0.1)
    train(callback, 3, Lit)
    assert sum(int(m.sum()) for m in callback.masks.values()) == 98
    if distribution == "uniform":
        assert [int(m.sum()) for m in callback.masks.values()] == [48, 40, 10]
    else:
        assert callback.layer_density["net.0.weight"] < callback.layer_density["net.4.weight"]


def test_the_first_training_is_a_dense_one_and_the_last_one_of_the_masked_start_alone():
    """Trained by hand: dense; then from the masked first values with masked gradients."""
    callback = LotteryTicket(0.8, rounds=1)
    module, _, looks = train(callback, 4, lambda: Lit(scheduler=step_lr))
    dense, _ = fit([], seeded(lambda: Lit(scheduler=step_lr)))
    assert same(looks.ends[1]["tensors"], dict(dense.named_parameters()))

    class Masked(Lit):
        def on_before_optimizer_step(self, optimizer):
            for name, mask in callback.masks.items():
                self.get_parameter(name).grad *= mask

    twin = seeded(lambda: Masked(scheduler=step_lr))
    with torch.no_grad():
        for name, mask in callback.masks.items():
            twin.get_parameter(name).mul_(mask)
    fit([], twin)
    assert same(dict(module.named_parameters()), dict(twin.named_parameters()))


def test_late_rewinding_repeats_the_epochs_from_there_on_with_their_momentum():
    callback = LotteryTicket(0.8, rounds=2, rewind_step=30)
    _, _, looks = train(callback, 3 + 2 * 2)
    early = looks.starts[1]
    assert early["momentum"]
    for start in (3, 5):
        now = looks.starts[start]
        assert same(now["tensors"], masked(early, now["masks"]))
        momentum = {n: m * now["masks"][n] if n in now["masks"] else m for n, m in early["momentum"].items()}
        assert same(now["momentum"], momentum)
    assert [look["lr"] for look in looks.starts] == [0.1, 0.05, 0.025, 0.05, 0.025, 0.05, 0.025]


def one_cycle(total):
    """A Lit whose learning rate moves with each step."""

    class Cycled(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.2, total_steps=total), "interval": "step"}]

    return Cycled(cnn())


def test_rewinding_within_an_epoch_repeats_the_steps_from_there_on_at_the_same_place_of_later_epochs():
    """After 10 steps; then each training has an epoch of 30: the prunings fall on steps 40 and 70."""
    callback = LotteryTicket(0.8, rounds=2, rewind_step=10)
    looks = []

    class Everywhere(Looks):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            looks.append(self.look(trainer, module))

    fit([callback, Everywhere(callback)], seeded(lambda: one_cycle(41)), max_epochs=-1, max_steps=100)
    early, size = looks[10], sum(m.numel() for m in callback.masks.values())
    counts = [sum(int(m.sum()) for m in look["masks"].values()) for look in looks]
    final = size - round(0.8 * size)
    assert counts == [size] * 40 + [round((size * final) ** 0.5)] * 30 + [final] * 30
    for start in (40, 70):
        now = looks[start]
        assert same(now["tensors"], masked(early, now["masks"]))
        momentum = {n: m * now["masks"][n] if n in now["masks"] else m for n, m in early["momentum"].items()}
        assert same(now["momentum"], momentum)
        assert [look["lr"] for look in looks[start : start + 30]] == [look["lr"] for look in looks[10:40]]


@pytest.mark.parametrize("stop", [8, 10, 25, 40, 55])
def test_a_run_stopped_within_an_epoch_resumes_to_the_last_bit(stop, tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    x, y = data(8)
    alike = DataLoader(TensorDataset(x.repeat(30, 1), y.repeat(30)), batch_size=8)  # it begins anew when resumed
    whole, resumed = (LotteryTicket(0.8, rounds=1, rewind_step=10) for _ in range(2))
    steps = {"max_epochs": -1, "max_steps": 70}
    module, _ = fit([whole, Saves()], seeded(lambda: one_cycle(41)), alike, **steps)
    again = seeded(lambda: one_cycle(41), 9)
    run = trainer(resumed, **steps)
    run.fit(again, alike, ckpt_path=tmp_path / "half.ckpt", **PLAINLY)
    assert run.global_step == 70
    assert same(state(whole), state(resumed))
    assert same(module.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("sparsity", "epochs", "rounds"),
    [
        (0.9, 55, 10),  # 20 % a round, five epochs each
        (0.9, 24, 3),  # four trainings of six
        (0.9, 8, 1),  # too short for more than one pruning
        (0.9, 7, 6),  # nothing else divides it
        (0.98, 95, 18),
        (0.5, 20, 3),
        (0.0, 2, 1),
    ],
)
def test_by_default_a_round_prunes_about_a_fifth_where_the_fit_has_room_for_it(sparsity, epochs, rounds):
    callback = LotteryTicket(sparsity)
    fit(callback, train=loader(8), max_epochs=epochs)
    assert callback.extra_metrics["sparsity/round"] == rounds
    assert callback.sparsity == pytest.approx(sparsity, abs=0.002)


def test_by_default_data_of_no_known_length_are_divided_by_epochs():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            x, y = data(16)
            yield from zip(x, y, strict=True)

    callback = LotteryTicket(0.5, rounds=2)
    fit(callback, train=DataLoader(Endless(), batch_size=8), max_epochs=6)
    assert callback.density == 0.5
    with pytest.raises(MisconfigurationException, match=r"limit_train_batches if the data have no known length"):
        fit(LotteryTicket(0.5, rounds=2, rewind_step=2), train=DataLoader(Endless(), batch_size=8), max_epochs=6)


def test_steps_that_do_not_make_up_the_rounds_are_refused_with_numbers_that_do():
    with pytest.raises(MisconfigurationException, match=r"The fit's 90 steps cannot .* Set max_steps to 70 or 130"):
        fit(LotteryTicket(0.8, rounds=1, rewind_step=10), max_epochs=3)


def decay(share):
    """A fall to 0 at a share of the fit's 6 epochs of 30 steps."""
    return lambda n: max(0.0, 1 - n / (180 * share))


@pytest.mark.parametrize(
    ("make", "interval", "long"),
    [
        (lambda o: OneCycleLR(o, 0.2, total_steps=181), "step", True),
        (lambda o: OneCycleLR(o, 0.2, total_steps=61), "step", False),
        (lambda o: CosineAnnealingLR(o, 6), "epoch", True),
        (lambda o: CosineAnnealingLR(o, 2), "epoch", False),
        (lambda o: MultiStepLR(o, [3, 5]), "epoch", True),
        (lambda o: MultiStepLR(o, [1]), "epoch", False),
        (lambda o: LambdaLR(o, decay(1)), "step", True),
        (lambda o: LambdaLR(o, decay(1 / 3)), "step", False),
        (lambda o: LambdaLR(o, lambda n: math.cos(math.pi * n / 180)), "step", True),
        (lambda o: LambdaLR(o, lambda n: 0.99**n), "step", False),
        (lambda o: LambdaLR(o, lambda n: [1.0, 0.8, 0.6, 0.4, 0.2, 0.0][n]), "epoch", True),
        (lambda o: LambdaLR(o, lambda n: [1.0, 0.5, 0.0][n]), "epoch", False),
        (lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=9), CosineAnnealingLR(o, 170)], [10]), "step", True),
        (lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=9), CosineAnnealingLR(o, 50)], [10]), "step", False),
        (lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=9), CosineAnnealingLR(o, 180)]), "step", True),
        (lambda o: WarmupCosineLR(o, 6, warmup=1), "epoch", True),
        (lambda o: WarmupCosineLR(o, 2, warmup=1), "epoch", False),
        (lambda o: WarmupMultiStepLR(o, [3, 5]), "epoch", True),
        (step_lr, "epoch", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_a_schedule_longer_than_a_training_is_told_of(make, interval, long):
    class Scheduled(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": make(optimizer), "interval": interval}]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([LotteryTicket(0.8, rounds=2), StopsAfter()], seeded(Scheduled), max_epochs=6)
    told = [str(w.message) for w in caught if "learning-rate schedule" in str(w.message)]
    assert len(told) == long
    assert all("LotteryTicket(sparsity=0.8, rounds=2): the learning-rate schedule" in text for text in told)


def test_schedules_of_steps_and_of_plateaus_restart_too():
    class Plateau(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flat"}}

        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    _, run, looks = train(LotteryTicket(0.8, rounds=2), 3, lambda: one_cycle(31))
    assert len({look["lr"] for look in looks.starts}) == len({look["lr"] for look in looks.ends}) == 1
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 30
    _, _, looks = train(LotteryTicket(0.8, rounds=1), 6, Plateau)
    assert [look["lr"] for look in looks.starts] == pytest.approx([0.1, 0.1, 0.01] * 2)


@functools.cache
def unbroken(rewind, epochs):
    """Return method and parameters after a run of three trainings."""
    callback = LotteryTicket(0.8, rounds=2, rewind_step=rewind)
    module, _, _ = train(callback, epochs)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    return callback, module.state_dict()


@pytest.mark.parametrize(("rewind", "epochs"), [(0, 6), (30, 7)])
@pytest.mark.parametrize("stop", range(1, 5))
def test_a_run_stopped_in_any_round_resumes_to_the_last_bit(stop, rewind, epochs, tmp_path):
    stopped, resumed = (LotteryTicket(0.8, rounds=2, rewind_step=rewind) for _ in range(2))
    _, run = fit([stopped, StopsAfter(stop - 1)], seeded(lambda: Lit(cnn(), scheduler=step_lr)), max_epochs=epochs)
    saved(run, tmp_path / "half.ckpt")
    again = seeded(lambda: Lit(cnn(), scheduler=step_lr), 9)
    run = trainer(resumed, max_epochs=epochs)
    run.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", **PLAINLY)
    whole, parameters = unbroken(rewind, epochs)
    assert same(state(whole), state(resumed))
    assert same(parameters, again.state_dict())


def test_the_round_is_logged(tmp_path):
    callback = LotteryTicket(0.8, rounds=2)
    train(callback, 3, Lit, logger=CSVLogger(tmp_path))
    (path,) = tmp_path.rglob("metrics.csv")
    lines = [line.split(",") for line in path.read_text().splitlines()]
    column = lines[0].index("sparsity/round")
    assert [float(line[column]) for line in lines[1:]] == [0, 1, 2]


def test_another_fit_trains_what_is_left_and_prunes_no_more():
    callback = LotteryTicket(0.8, rounds=2)
    module, _, _ = train(callback, 3)
    before = callback.masks
    fit(callback, module, max_epochs=1)
    assert same(before, callback.masks)


def test_weights_that_join_later_are_pruned_as_far_as_the_others_are():
    class Joins(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[:4].parameters(), lr=0.1, momentum=0.9)

        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.optimizers().add_param_group({"params": list(self.net[4].parameters()), "lr": 0.05})

    callback = LotteryTicket(0.8, rounds=2)
    module, run, looks = train(callback, 6, Joins)
    assert int(looks.ends[2]["masks"]["net.4.weight"].sum()) == round(40 * (8 / 40) ** 0.5)
    assert callback.density == (392 - round(0.8 * 392)) / 392
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.05]
    assert effective(module, callback)


def test_an_optimizer_state_comes_back_where_weights_have_joined_a_group():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1, momentum=0.9)
    for p in (a, b):
        p.grad = torch.ones(2) * (1 if p is a else 2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["params"].append(c)
    optimizer.param_groups[0]["lr"] = 0.5
    c.grad = torch.ones(2)
    optimizer.step()
    _load(optimizer, before)
    assert optimizer.state[a]["momentum_buffer"].tolist() == [1, 1]
    assert optimizer.state[b]["momentum_buffer"].tolist() == [2, 2]
    assert c not in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "epochs", "good"),
    [
        ({"rounds": 2}, 7, "6 or 9"),
        ({"rounds": 2}, 2, "3 or 6"),
        ({"rounds": 1, "rewind_step": 60}, 2, "4 or 6"),
        ({}, 11, "10 or 12"),
        ({}, 1, "2 or 3"),
    ],
)
def test_epochs_that_do_not_make_up_the_rounds_are_refused_with_numbers_that_do(options, epochs, good):
    with pytest.raises(MisconfigurationException, match=rf"{epochs} epochs cannot be divided .* max_epochs to {good}"):
        fit(LotteryTicket(0.8, **options), max_epochs=epochs)


def test_an_average_of_weights_has_to_begin_after_the_last_rewinding():
    with pytest.raises(MisconfigurationException, match=r"rewinds .* in epoch 4 for .* does in epoch 4 .*=6 or more"):
        fit([LotteryTicket(0.8, rounds=2), StochasticWeightAveraging(0.01, swa_epoch_start=5)], max_epochs=6)
    callback = LotteryTicket(0.8, rounds=2)
    module, _ = fit([callback, StochasticWeightAveraging(0.01, swa_epoch_start=6)], max_epochs=6)
    assert effective(module, callback)


def test_a_fit_without_end_is_refused():
    with pytest.raises(MisconfigurationException, match=r"divides the fit into trainings of equal length.*max_epochs"):
        fit(LotteryTicket(0.8, rounds=2), max_epochs=-1, max_time={"seconds": 20})


def test_a_floor_above_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"min_layer_density=0.5 alone takes 196 weights, the budget is 78"):
        fit(LotteryTicket(0.8, rounds=1, min_layer_density=0.5), max_epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"rewind_step": -1}, "rewind_step must be an integer of at least 0, got -1"),
        ({"scope": "row"}, "scope must be one of .* got 'row'"),
        ({"sparsity": 1.0}, "sparsity must be below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LotteryTicket(**{"sparsity": 0.8, **options})


def test_the_state_of_an_earlier_version_is_refused_with_what_to_do():
    callback = LotteryTicket(0.8, rounds=1)
    fit(callback, max_epochs=2)
    state = copy.deepcopy(callback.state_dict())
    del state["rounds"]
    with pytest.raises(MisconfigurationException, match=r"earlier version of \w+, .*load_from_checkpoint\(path\)"):
        LotteryTicket(0.8, rounds=1).load_state_dict(state)
