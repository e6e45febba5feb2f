"""Sets of images in memory: batches gathered by one indexing operation, and augmented as a whole."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad
from torch.utils.data import Dataset

from lightning_sparse.compat import checks
from lightning_sparse.zoo.data.loader import DataModule, epoch_generator

__all__ = [
    "ByteImageDataModule",
    "ByteImages",
    "ImageDataModule",
    "TensorImages",
    "crop",
    "flip",
    "mean_and_std",
    "rotate",
]

Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------- augmentation: pure functions of tensors


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pad with zeros on all sides and cut out windows of the first size.

    Args:
        images: ``(batch, channels, height, width)``.
        offsets: of each window's upper left corner, whole numbers from 0 to ``2 padding``, ``(batch, 2)``: row, column.
        padding: pixels on each side; the offset ``padding`` gives the image as it was.
    """
    height, width = images.shape[2:]
    windows = pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, offsets[:, 0], offsets[:, 1]]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images, a boolean each, ``(batch,)``, left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image by its angle ``(batch,)``, counterclockwise; nearest pixels, black corners, the same size."""
    height, width = images.shape[2:]
    radians = degrees.float() * (pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    matrix = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(-1, 2, 3)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(images.dtype)


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of byte images, as shares of 255.

    >>> mean_and_std(torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(2, 1, 1, 2))
    ([0.5], [0.5])
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        parts = [torch.bincount(part[:, channel].flatten(), minlength=256) for part in torch.split(images, 10_000)]
        share = torch.stack(parts).sum(0).double() / images[:, channel].numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(float(share @ (values - mean).square()) ** 0.5)
    return means, stds


# ---------------------------------------------------------------------- sets


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
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch; loaders call this instead of ``__getitem__``."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


class ByteImages(TensorImages):
    """Images kept as bytes; a batch is augmented, scaled to [0, 1], shifted by the mean and divided by the deviation.

    How an image is augmented depends on the seed, the epoch and its index alone: not on the batch it is in, the number
    of processes, or on where a run was resumed.

    Args:
        images: ``(count, channels, height, width)``, uint8.
        labels: ``(count,)``.
        mean: of each channel, as a share of 255.
        std: likewise the standard deviation.
        padding: cut out a random window of the image with so many black pixels around it; 0: do not.
        flip: mirror a random half of the images left to right.
        rotation: turn by a random angle of at most so many degrees either way.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        rotation: float = 0.0,
    ) -> None:
        super().__init__(images, labels)
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.padding = padding
        self.flip = flip
        self.rotation = rotation
        self.begin_epoch(0, 0)

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Draw how each image is augmented in this epoch."""
        generator, count = epoch_generator(seed, epoch), len(self)
        self._offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        self._flipped = torch.rand(count, generator=generator) < 0.5
        self._degrees = (torch.rand(count, generator=generator) * 2 - 1) * self.rotation

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch, float32; loaders call this instead of ``__getitem__``."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.padding:
            images = crop(images, self._offsets[chosen], self.padding)
        if self.flip:
            images = flip(images, self._flipped[chosen])
        if self.rotation:
            images = rotate(images, self._degrees[chosen])
        return images.float().div_(255).sub_(self.mean).div_(self.std), self.labels[chosen]


# ---------------------------------------------------------------------- data modules


class ImageDataModule(DataModule):
    """Base of the data modules of images.

    Args:
        batch_size: images per training batch and process.
        seed: of the order of the training images and of augmentation; None: that of ``seed_everything`` (0 if it was
            not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.
        workers: number of processes that load batches; 0: the training process itself.
    """

    def __init__(self, batch_size: int, seed: int | None, eval_batch_size: int, workers: int = 0) -> None:
        checks.integer(1, "The papers' values are from 64 to 1024.", batch_size=batch_size)
        checks.integer(1, "It changes speed and memory alone.", eval_batch_size=eval_batch_size)
        checks.integer(0, "0 loads batches in the training process.", workers=workers)
        super().__init__(batch_size, eval_batch_size, seed, workers)


class ByteImageDataModule(ImageDataModule):
    """Base of the data modules of coloured images that are small enough to be kept in memory, as bytes.

    The test images serve for validation, too, unless ``val_from_train`` says otherwise.

    Args:
        batch_size: images per training batch and process.
        padding: cut training images out at random from the image with so many black pixels around it; 0: do not.
        flip: mirror a random half of the training images left to right.
        rotation: turn training images by a random angle of at most so many degrees either way.
        val_from_train: take so many images, evenly spread over the training set, for validation; they are not
            augmented.
        seed: of order and augmentation; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.
    """

    def __init__(
        self,
        batch_size: int,
        padding: int,
        flip: bool,
        rotation: float,
        val_from_train: int,
        seed: int | None,
        eval_batch_size: int,
    ) -> None:
        checks.integer(0, "The papers' value for images of 32 x 32 is 4; 0 switches it off.", padding=padding)
        checks.at_least(0, "15 turns by up to 15 degrees either way; 0 switches it off.", rotation=rotation)
        checks.integer(0, "0 validates on the test images.", val_from_train=val_from_train)
        checks.flag(flip=flip)
        super().__init__(batch_size, seed, eval_batch_size)
        self.padding = padding
        self.flip = flip
        self.rotation = rotation
        self.val_from_train = val_from_train

    def _take(self, train: Batch, test: Batch, mean: Sequence[float], std: Sequence[float]) -> None:
        """Make the sets of bytes and labels."""
        images, labels = train
        count, held = len(labels), self.val_from_train
        if held >= count:
            raise ValueError(f"val_from_train must leave images to train on: below {count}, got {held}.")
        self.test = self.val = ByteImages(*test, mean, std)
        if held:
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[torch.arange(held) * count // held] = True  # sets that are sorted by class give some of each
            self.val = ByteImages(images[chosen], labels[chosen], mean, std)
            images, labels = images[~chosen], labels[~chosen]
        self.train = ByteImages(images, labels, mean, std, self.padding, self.flip, self.rotation)
