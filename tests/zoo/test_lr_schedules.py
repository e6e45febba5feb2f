import math

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse.zoo.models import InverseSquareRootLR, LeNet300, WarmupCosineLR, WarmupMultiStepLR


def sgd(lr=0.5):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(make, moves, lr=0.5):
    """The rates under which the first steps are taken."""
    optimizer = sgd(lr)
    scheduler = make(optimizer)
    found = []
    for _ in range(moves):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_without_a_warm_up_steps_are_those_of_torch():
    theirs = rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5], 0.2), 8)
    assert rates(lambda o: WarmupMultiStepLR(o, [3, 5], 0.2), 8) == pytest.approx(theirs)


def test_without_a_warm_up_the_cosine_is_that_of_torch():
    theirs = rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9), 10)
    assert rates(lambda o: WarmupCosineLR(o, 9), 10) == pytest.approx(theirs)


def test_by_epoch_warm_up_and_cosine_are_those_of_strs_authors():
    expected = [0.5 * (e + 1) / 5 for e in range(5)]
    expected += [0.25 * (1 + math.cos(math.pi * (e - 5) / 15)) for e in range(5, 20)]
    assert rates(lambda o: WarmupCosineLR(o, 20, warmup=5), 20) == pytest.approx(expected)


def test_the_fall_with_the_square_root_is_equation_3_of_the_transformers_paper():
    width, warmup = 512, 40
    expected = [width**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 200)]
    assert rates(lambda o: InverseSquareRootLR(o, warmup), 199, (width * warmup) ** -0.5) == pytest.approx(expected)


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def batches(count, size=2):
    x = torch.rand(count * size, 1, 4, 4)
    return DataLoader(list(zip(x, torch.arange(len(x)) % 3, strict=True)), batch_size=size)


def small(**training):
    return LeNet300(16, (3, 3), 3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **training)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_by_step_a_schedule_still_counts_epochs(accumulate):
    watch, epochs = Rates(), 4
    module = small(lr_interval="step", lr_scheduler=lambda o: WarmupMultiStepLR(o, [2, 3], 0.1, warmup=1.5))
    trainer(watch, max_epochs=epochs, accumulate_grad_batches=accumulate).fit(module, batches(7))
    steps = math.ceil(7 / accumulate)
    assert len(watch.seen) == epochs * steps
    warm = [min(1, (step + 1) / (1.5 * steps)) for step in range(2 * steps)]
    assert [rate for (rate,) in watch.seen] == pytest.approx(warm + steps * [0.1] + steps * [0.01])


def test_by_epoch_it_moves_between_epochs_only():
    watch = Rates()
    module = small(lr_scheduler=lambda o: WarmupCosineLR(o, 4, warmup=2))
    trainer(watch, max_epochs=4).fit(module, batches(3))
    expected = [0.5] * 3 + [1.0] * 3 + [1.0] * 3 + [0.5] * 3
    assert [rate for (rate,) in watch.seen] == pytest.approx(expected)


def test_by_step_torchs_own_schedules_count_steps():
    watch = Rates()
    module = small(lr_interval="step", lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
    trainer(watch, max_epochs=1).fit(module, batches(5))
    assert [rate for (rate,) in watch.seen] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_all_parameter_groups_follow_in_their_proportion():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.5}, {"params": [torch.zeros(1)], "lr": 0.1}])
    scheduler = WarmupMultiStepLR(optimizer, [], warmup=2)
    scheduler.count_steps(2)
    assert scheduler.get_last_lr() == pytest.approx([0.125, 0.025])


def test_a_resumed_run_has_the_rates_of_an_unbroken_one(tmp_path):
    def run(epochs, path=None):
        watch = Rates()
        module = small(lr_interval="step", lr_scheduler=lambda o: WarmupCosineLR(o, 4, warmup=1))
        fitted = trainer(watch, max_epochs=epochs)
        fitted.fit(module, batches(3), ckpt_path=path)
        return watch.seen, fitted

    whole, _ = run(4)
    first, fitted = run(2)
    fitted.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert first + run(4, tmp_path / "half.ckpt")[0] == whole


def test_by_step_the_length_of_an_epoch_must_be_known():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.rand(1, 4, 4), 0

    module = small(lr_interval="step", lr_scheduler=lambda o: WarmupMultiStepLR(o, [2]))
    with pytest.raises(ValueError, match=r'lr_interval must be "epoch" when the length .* is not known'):
        trainer([], max_epochs=1).fit(module, DataLoader(Stream(), batch_size=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupMultiStepLR(sgd(), [3, 2]), r"milestones must be increasing epochs, got \[3, 2\]"),
        (lambda: WarmupMultiStepLR(sgd(), [2], gamma=-1), "gamma must be a finite number of at least 0, got -1"),
        (lambda: WarmupMultiStepLR(sgd(), [2], warmup=-1), "warmup must be a finite number of at least 0, got -1"),
        (lambda: WarmupCosineLR(sgd(), 5, warmup=5), "epochs must be greater than warmup, 5, got 5"),
        (lambda: InverseSquareRootLR(sgd(), 0), "warmup_steps must be an integer of at least 1, got 0"),
        (lambda: small(lr_interval="batch"), r"lr_interval must be one of \['epoch', 'step'\], got 'batch'"),
        (lambda: small(label_smoothing=2), "label_smoothing must be a number from 0 to 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
