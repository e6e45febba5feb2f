"""Digits and MNIST as LightningDataModules: whole sets in memory, batches gathered by one indexing operation.

The order of the training images depends on the seed and the epoch alone, not on the state of a random generator, and
the loader's place within an epoch goes into checkpoints: a run that is resumed, even in the middle of an epoch, sees
the batches it would have seen.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_sparse import checks
from lightning_sparse._extras import extra
from lightning_sparse._lightning import PACKAGE

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    LightningDataModule = import_module(PACKAGE).LightningDataModule

__all__ = ["DigitsDataModule", "ImageDataModule", "MNISTDataModule", "ResumableLoader", "TensorImages"]

Batch = tuple[Tensor, Tensor]


class TensorImages(Dataset[Batch]):
    """Images and labels in memory.

    Args:
        images: ``(count, channels, height, width)``.
        labels: ``(count,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch; loaders call this instead of ``__getitem__``."""
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: ``__getitems__`` returned a batch."""
    return batch


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that knows its place: Lightning writes it into checkpoints and gives it back.

    Its sampler must have an ``epoch`` that settles the order, as ``DistributedSampler`` does.
    """

    _taken = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator: runs when the epoch is known
        place, self._resume = self._resume, None
        skip = place[1] if place is not None and place[0] == self._epoch else 0
        for self._taken, batch in enumerate(super().__iter__(), 1):
            if self._taken > skip:
                yield batch

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", -1)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were handed out."""
        return {"epoch": self._epoch, "batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were handed out, if the next pass is of that epoch."""
        self._resume = state["epoch"], state["batches"]
        self._taken = state["batches"]


class ImageDataModule(LightningDataModule):
    """Base of the data modules: a subclass's ``setup`` sets ``train``, ``val`` and ``test``.

    Args:
        batch_size: images per training batch and process.
        seed: of the order of the training images; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.
    """

    train: TensorImages
    val: TensorImages
    test: TensorImages

    def __init__(self, batch_size: int, seed: int | None, eval_batch_size: int) -> None:
        super().__init__()
        checks.integer(1, "The papers' value for MNIST is 64.", batch_size=batch_size)
        checks.integer(1, "It changes speed and memory alone.", eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.seed = seed
        self.eval_batch_size = eval_batch_size

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches, shuffled by seed and epoch and shared out among processes."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: Any = DistributedSampler(self.train, num_replicas=processes, rank=rank, shuffle=True, seed=seed)
        return ResumableLoader(self.train, batch_size=self.batch_size, sampler=sampler, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return self._in_order(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self._in_order(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self._in_order(self.test)

    def _in_order(self, images: TensorImages) -> DataLoader[Batch]:
        return DataLoader(images, batch_size=self.eval_batch_size, collate_fn=_as_it_is)


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8, values scaled to [0, 1]. Needs no download.

    80 % of each class are for training; the others serve for validation and test alike.

    Args:
        batch_size: images per training batch and process.
        seed: of the order of the training images; None: that of ``seed_everything`` (0 if it was not called).
        split_seed: of the split into training and validation.
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Example:
        >>> from lightning_sparse.data import DigitsDataModule
        >>> data = DigitsDataModule()
        >>> data.setup("fit")
        >>> data.train.images.shape, len(data.val)
        (torch.Size([1437, 1, 8, 8]), 360)
    """

    def __init__(
        self, batch_size: int = 64, seed: int | None = None, split_seed: int = 0, eval_batch_size: int = 1000
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size)
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        images, labels = extra("sklearn.datasets", "examples").load_digits(return_X_y=True)
        split = extra("sklearn.model_selection", "examples").train_test_split
        train, held = split(range(len(labels)), test_size=0.2, stratify=labels, random_state=self.split_seed)
        whole = TensorImages(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))
        self.train = TensorImages(*whole.__getitems__(train))
        self.val = self.test = TensorImages(*whole.__getitems__(held))


class MNISTDataModule(ImageDataModule):
    """MNIST: 60,000 training and 10,000 test images of 28 x 28.

    As in the papers' recipes, the 10,000 test images serve for validation and for the test: an epoch chosen by
    ``val_acc`` is chosen on the test set. ``val_from_train`` takes the validation images away from training instead.

    Args:
        data_dir: the directory that holds ``MNIST/raw/`` with the four files.
        batch_size: images per training batch and process.
        download: fetch the files if they are missing.
        normalise: shift and scale the pixels from [0, 1] by mean 0.1307 and standard deviation 0.3081.
        val_from_train: take so many images, the last of the training set, for validation.
        seed: of the order of the training images; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: files are missing and ``download`` is False; the message lists them.

    Example:
        >>> from lightning_sparse.data import MNISTDataModule
        >>> data = MNISTDataModule("data", batch_size=64, download=True)
    """

    mean = 0.1307
    std = 0.3081
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 64,
        download: bool = False,
        normalise: bool = True,
        val_from_train: int = 0,
        seed: int | None = None,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size)
        checks.integer(0, "0 validates on the test images.", val_from_train=val_from_train)
        if val_from_train >= 60_000:
            raise ValueError(f"val_from_train must leave images to train on: below 60000, got {val_from_train}.")
        self.data_dir = data_dir
        self.download = download
        self.normalise = normalise
        self.val_from_train = val_from_train

    def prepare_data(self) -> None:
        """Download the files if that is allowed, or raise if they are missing."""
        if self.download:
            extra("torchvision.datasets", "examples").MNIST(self.data_dir, download=True)
        raw = Path(self.data_dir) / "MNIST" / "raw"
        missing = [name for name in self.files if not (raw / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"MNIST is not whole in {raw.resolve()}: {', '.join(missing)} missing (of {', '.join(self.files)}). "
                "Put the files there, unpacked (gunzip *.gz), or name the directory above MNIST/raw with data_dir, "
                "or set download=True to fetch them."
            )

    def setup(self, stage: str) -> None:
        """Load the images."""
        self.prepare_data()  # under several processes and machines only some have called it
        train, self.test = self._load(train=True), self._load(train=False)
        keep = len(train) - self.val_from_train
        self.train = TensorImages(train.images[:keep], train.labels[:keep])
        self.val = TensorImages(train.images[keep:], train.labels[keep:]) if self.val_from_train else self.test

    def _load(self, train: bool) -> TensorImages:
        mnist = extra("torchvision.datasets", "examples").MNIST(self.data_dir, train=train)
        images = mnist.data.unsqueeze(1).float().div_(255)
        if self.normalise:
            images.sub_(self.mean).div_(self.std)
        return TensorImages(images, mnist.targets)
