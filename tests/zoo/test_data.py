import gzip
import os
import struct

import data_ranks
import lightning.pytorch as pl
import numpy
import pytest
import torch
from batches import Seen
from helpers import trainer
from processes import run_fresh
from torch.utils.data import SequentialSampler

from lightning_sparse.zoo.data import DigitsDataModule, MNISTDataModule, ResumableLoader, TensorImages
from lightning_sparse.zoo.models import LeNet300


@pytest.fixture
def mnist(tmp_path):
    """The four files of MNIST with 30 training and 20 test images; pixel values count up from 0 to 255."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        pixels = (numpy.arange(count * 784) % 256).astype("uint8")
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        labels = (numpy.arange(count) % 10).astype("uint8")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return tmp_path


def order(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return torch.cat([x.flatten(1).sum(1) for x, _ in loader])


# ---------------------------------------------------------------------- digits


def test_digits_are_split_by_class_and_scaled():
    data = DigitsDataModule()
    data.setup("fit")
    assert (len(data.train), len(data.val), len(data.test)) == (1437, 360, 360)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.min() == 0
    assert data.train.images.max() == 1
    whole = torch.cat([data.train.labels, data.val.labels]).bincount()
    assert (data.val.labels.bincount() - whole * 0.2).abs().max() < 1


def test_the_split_of_digits_depends_on_its_seed_alone():
    first, again, other = DigitsDataModule(seed=1), DigitsDataModule(seed=2), DigitsDataModule(split_seed=1)
    for data in (first, again, other):
        torch.rand(1)
        data.setup("fit")
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


# ---------------------------------------------------------------------- MNIST


def test_mnist_is_normalised_as_by_the_papers_authors(mnist):
    data = MNISTDataModule(str(mnist))
    data.prepare_data()
    data.setup("fit")
    assert data.train.images.shape == (30, 1, 28, 28)
    assert data.train.images.dtype == torch.float32
    first = data.train.images[0].flatten()[:256]
    torch.testing.assert_close(first, (torch.arange(256) / 255 - 0.1307) / 0.3081)
    assert data.train.labels[:12].tolist() == [*range(10), 0, 1]
    assert data.val is data.test
    assert len(data.test) == 20


def test_mnist_stays_between_0_and_1_without_normalisation(mnist):
    data = MNISTDataModule(str(mnist), normalise=False)
    data.setup("fit")
    assert (data.train.images.min(), data.train.images.max()) == (0, 1)


def test_validation_images_can_come_from_the_training_set(mnist):
    data = MNISTDataModule(str(mnist), val_from_train=12)
    data.setup("fit")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 12, 20)
    assert data.val.labels.tolist() == [n % 10 for n in range(18, 30)]


def test_missing_files_are_named_with_the_place_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw.*train-images-idx3-ubyte.*gunzip.*download=True"):
        MNISTDataModule(str(tmp_path)).prepare_data()


def test_files_that_are_still_packed_count_as_missing(mnist):
    file = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    with gzip.open(f"{file}.gz", "wb") as packed:
        packed.write(file.read_bytes())
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte missing.*gunzip"):
        MNISTDataModule(str(mnist)).setup("fit")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be an integer of at least 1, got -1"),
        ({"val_from_train": -1}, "val_from_train must be an integer of at least 0, got -1"),
        ({"val_from_train": 60_000}, "val_from_train must leave images to train on: below 60000, got 60000"),
    ],
)
def test_bad_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**argument)


# ---------------------------------------------------------------------- order of the batches


def test_a_batch_is_one_indexing_operation():
    class Counting(TensorImages):
        calls = 0

        def __getitem__(self, index):
            raise AssertionError("images are fetched one by one")

        def __getitems__(self, indices):
            self.calls += 1
            return super().__getitems__(indices)

    data = DigitsDataModule(batch_size=100)
    data.setup("fit")
    data.train = Counting(data.train.images, data.train.labels)
    assert [len(y) for _, y in data.train_dataloader()] == [100] * 14 + [37]
    assert data.train.calls == 15


def test_the_order_depends_on_seed_and_epoch_alone():
    data, other = DigitsDataModule(seed=3), DigitsDataModule(seed=4)
    for each in (data, other):
        each.setup("fit")
    first = order(data.train_dataloader(), 5)
    torch.rand(7)
    assert torch.equal(first, order(data.train_dataloader(), 5))
    assert not torch.equal(first, order(data.train_dataloader(), 6))
    assert not torch.equal(first, order(other.train_dataloader(), 5))


def test_the_seed_is_that_of_seed_everything_if_none_is_given(monkeypatch):
    data, given = DigitsDataModule(), DigitsDataModule(seed=11)
    for each in (data, given):
        each.setup("fit")
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "11")
    assert torch.equal(order(data.train_dataloader(), 0), order(given.train_dataloader(), 0))


def test_lightning_shuffles_anew_every_epoch():
    seen = Seen()
    trainer(seen, max_epochs=2, limit_val_batches=0).fit(LeNet300(inputs=64), DigitsDataModule(batch_size=500))
    first, second = ([b[2] for b in seen.batches if b[0] == epoch] for epoch in (0, 1))
    assert len(first) == len(second) == 3
    assert first != second


@pytest.mark.parametrize("stop_after", [1, 4, 6, 8, 9], ids=lambda n: f"batch{n}")
def test_a_resumed_run_sees_the_batches_it_would_have_seen(tmp_path, stop_after):
    def fit(seen, ckpt_path=None):
        run = trainer(seen, max_epochs=3, default_root_dir=tmp_path)
        module = LeNet300(inputs=64, hidden=(4, 4))
        run.fit(module, DigitsDataModule(batch_size=400), ckpt_path=ckpt_path)
        return module

    whole, before, after = Seen(), Seen(stop_after), Seen()
    pl.seed_everything(1)
    through = fit(whole)
    pl.seed_everything(1)
    fit(before)
    resumed = fit(after, tmp_path / "middle.ckpt")
    assert len(whole.batches) == 12
    assert before.batches[:stop_after] + after.batches == whole.batches
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_resumed_run_with_a_batch_limit_starts_the_next_epoch_at_its_beginning(tmp_path):
    def fit(seen, ckpt_path=None, **kwargs):
        run = trainer(seen, default_root_dir=tmp_path, limit_train_batches=2, **kwargs)
        run.fit(LeNet300(inputs=64), DigitsDataModule(batch_size=400, seed=0), ckpt_path=ckpt_path)
        return run

    whole, first, second = Seen(), Seen(), Seen()
    fit(whole, max_epochs=2)
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    fit(second, tmp_path / "first.ckpt", max_epochs=2)
    assert first.batches + second.batches == whole.batches


def test_the_loaders_state_skips_what_was_handed_out():
    data = DigitsDataModule(batch_size=400, seed=0)
    data.setup("fit")
    loader, fresh = data.train_dataloader(), data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = list(loader)
    stopped = iter(loader)
    next(stopped), next(stopped)
    state = loader.state_dict()
    assert state == {"epoch": 0, "batches": 2}
    fresh.load_state_dict(state)
    rest = list(fresh)
    assert [y.tolist() for _, y in rest] == [y.tolist() for _, y in batches[2:]]
    assert len(list(fresh)) == len(batches)


def test_evaluation_goes_through_the_images_in_order():
    data = DigitsDataModule(eval_batch_size=100)
    data.setup("fit")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
        assert torch.equal(torch.cat([y for _, y in loader]), data.val.labels)


def test_two_processes_share_the_batches_of_one(tmp_path):
    run_fresh(data_ranks.run_all, tmp_path)  # forks, which a process that has used autograd may not
    for kind, held_out in (("plain", 360), ("augmented", 60)):
        one = torch.load(tmp_path / kind / "one" / "0.pt")
        ranks = [torch.load(tmp_path / kind / "two" / f"{rank}.pt") for rank in (0, 1)]
        batches = sum(whole[0] != "val" for whole in one) // 2
        for whole, *parts in zip(one, *ranks, strict=True):
            if whole[0] == "val":
                assert sum(part[2] for part in parts) == whole[2] == held_out
            elif whole[1] < batches - 1:  # the last batch may hold an image more, so that ranks are even
                assert sorted(parts[0][2] + parts[1][2]) == whole[2]


def test_overfitting_takes_the_first_batches_again_and_again():
    seen = Seen()
    run = trainer(seen, max_epochs=2, overfit_batches=2)
    run.fit(LeNet300(inputs=64, hidden=(4, 4)), DigitsDataModule(batch_size=400))
    assert [batch[2:] for batch in seen.batches[:2]] == [batch[2:] for batch in seen.batches[2:]]
    assert len(seen.batches) == 4


def test_a_resumed_pass_loads_nothing_that_was_handed_out():
    class Counting(TensorImages):
        loaded = 0

        def __getitems__(self, indices):
            self.loaded += len(indices)
            return super().__getitems__(indices)

    data = DigitsDataModule(batch_size=400, seed=0)
    data.setup("fit")
    data.train = Counting(data.train.images, data.train.labels)
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 3})
    assert [len(y) for _, y in loader] == [237]
    assert data.train.loaded == 237
