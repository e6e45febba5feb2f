"""Small images in class folders, decoded once and kept in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.data.images import Batch, ByteImageDataModule, mean_and_std

__all__ = ["ImageFolderDataModule", "TinyImageNetDataModule"]

Samples = list[tuple[str, int]]  # file and class of each image


def decode(samples: Samples) -> Batch:
    """Read images, all of one size, into one tensor of bytes ``(count, 3, height, width)``, and their labels.

    Raises:
        ValueError: an image has another size than the first; the message names it.
    """
    load = extra("torchvision.datasets.folder", "examples").default_loader
    first = numpy.asarray(load(samples[0][0]))
    images = numpy.empty((len(samples), *first.shape), numpy.uint8)
    for index, (file, _) in enumerate(samples):  # threads would wait for one another: there is little to decode
        image = numpy.asarray(load(file))
        if image.shape != first.shape:
            raise ValueError(
                f"images must have one size, got {file} of {list(image.shape[:2])} beside {samples[0][0]} of "
                f"{list(first.shape[:2])}. Resize them, or use ImageNetDataModule, which cuts them to one size."
            )
        images[index] = image
    labels = torch.tensor([label for _, label in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


class ImageFolderDataModule(ByteImageDataModule):
    """Small images of one size in class folders (``train/CLASS/*.jpg``), kept in memory as bytes.

    Classes are the folders of ``train`` in alphabetical order. The test images serve for validation, too, unless
    ``val_from_train`` says otherwise.

    Args:
        data_dir: the directory that holds the folders ``train`` and ``test``.
        train: name of the folder of training images.
        test: name of the folder of test images; it must have the classes of ``train``.
        batch_size: images per training batch and process.
        mean: of each channel on the scale from 0 to 1, to be subtracted; None: that of the training images.
        std: standard deviation of each channel, to divide by; None: that of the training images.
        padding: black pixels around a training image before it is cut out; 0: do not.
        flip: mirror a random half of the training images left to right.
        rotation: turn training images by a random angle of at most so many degrees either way.
        val_from_train: take so many images, evenly spread over the training set, for validation; they are not
            augmented.
        seed: of order and augmentation; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Raises:
        ValueError: an argument is out of range, images differ in size, or ``test`` has other classes.
        FileNotFoundError: a folder is missing.

    Example:
        >>> from lightning_sparse.zoo.data import ImageFolderDataModule
        >>> data = ImageFolderDataModule("cifar10-jpeg", batch_size=64)
    """

    def __init__(
        self,
        data_dir: str = "data",
        train: str = "train",
        test: str = "test",
        batch_size: int = 128,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        padding: int = 4,
        flip: bool = True,
        rotation: float = 0.0,
        val_from_train: int = 0,
        seed: int | None = None,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(batch_size, padding, flip, rotation, val_from_train, seed, eval_batch_size)
        checks.path("It is the folder of the files.", data_dir=data_dir)
        checks.text("It is the name of a folder.", train=train)
        checks.text("It is the name of a folder.", test=test)
        if mean is not None:
            checks.vector("Leave it out to take that of the images.", mean=mean)
        if std is not None:
            checks.vector("Leave it out to take that of the images.", std=std)
        self.data_dir = data_dir
        self.folders = train, test
        self.mean = mean
        self.std = std

    def prepare_data(self) -> None:
        """Raise if a folder is missing."""
        missing = [name for name in self.folders if not (Path(self.data_dir) / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"No folder {' and no folder '.join(missing)} in {Path(self.data_dir).resolve()}. Images are expected "
                f"in {self.folders[0]}/CLASS/ and {self.folders[1]}/CLASS/: name the directory above with data_dir, "
                "the two folders with train and test."
            )

    def setup(self, stage: str) -> None:
        """Decode the images."""
        self.prepare_data()  # under several processes and machines only some have called it
        train, test = self._samples()
        images, labels = decode(train)
        mean, std = mean_and_std(images)
        self._take((images, labels), decode(test), self.mean or mean, self.std or std)

    def _samples(self) -> tuple[Samples, Samples]:
        image_folder = extra("torchvision.datasets", "examples").ImageFolder
        train, test = (image_folder(Path(self.data_dir) / name) for name in self.folders)
        if train.classes != test.classes:
            raise ValueError(
                f"{self.folders[1]} must have the classes of {self.folders[0]}, {train.classes}, got {test.classes}."
            )
        return train.samples, test.samples


class TinyImageNetDataModule(ImageFolderDataModule):
    """Tiny-ImageNet: 100,000 training images of 64 x 64 in 200 classes, kept in memory as bytes (1.4 GB).

    Its test set has no labels, so its 10,000 validation images serve for validation and test. They lie in one folder,
    ``val/images``, with their classes in ``val/val_annotations.txt``.

    Args:
        data_dir: the directory that holds ``train`` and ``val``, as unpacked: ``.../tiny-imagenet-200``.
        batch_size: images per training batch and process.
        padding: black pixels around a training image before it is cut out; 0: do not.
        flip: mirror a random half of the training images left to right.
        rotation: turn training images by a random angle of at most so many degrees either way.
        val_from_train: take so many images, evenly spread over the training set, for validation; they are not
            augmented.
        seed: of order and augmentation; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: files are missing; the message says how to get them.

    Example:
        >>> from lightning_sparse.zoo.data import TinyImageNetDataModule
        >>> data = TinyImageNetDataModule("data/tiny-imagenet-200", batch_size=128)
    """

    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    def __init__(
        self,
        data_dir: str = "data/tiny-imagenet-200",
        batch_size: int = 128,
        padding: int = 4,
        flip: bool = True,
        rotation: float = 0.0,
        val_from_train: int = 0,
        seed: int | None = None,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(
            data_dir,
            "train",
            "val",
            batch_size,
            padding=padding,
            flip=flip,
            rotation=rotation,
            val_from_train=val_from_train,
            seed=seed,
            eval_batch_size=eval_batch_size,
        )

    def prepare_data(self) -> None:
        """Raise if files are missing."""
        root = Path(self.data_dir)
        missing = [name for name in ("train", "val/images", "val/val_annotations.txt") if not (root / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"Tiny-ImageNet is not whole in {root.resolve()}: {', '.join(missing)} missing. Fetch {self.url} "
                "(240 MB), unpack it and name its folder tiny-imagenet-200 with data_dir."
            )

    def _samples(self) -> tuple[Samples, Samples]:
        root = Path(self.data_dir)
        train = extra("torchvision.datasets", "examples").ImageFolder(root / "train")
        lines = (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        classes = dict(line.split("\t")[:2] for line in lines)  # file, class, and a box that is not used
        val = [(str(root / "val" / "images" / name), train.class_to_idx[label]) for name, label in classes.items()]
        return train.samples, val
