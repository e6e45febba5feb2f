"""ImageNet, and other images of any size in class folders, read from disk by worker processes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.data.images import ImageDataModule
from lightning_sparse.zoo.data.loader import epoch_generator

__all__ = ["FolderImages", "ImageNetDataModule"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images in class folders whose random transformation depends on seed, epoch and the image's index alone.

    Args:
        folder: torchvision's ``ImageFolder``.
        transform: from a PIL image to a tensor; its random numbers are those of torch.
    """

    def __init__(self, folder: Any, transform: Any) -> None:
        self.folder = folder
        self.transform = transform
        self.begin_epoch(0, 0)

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Draw the seed of each image's transformation."""
        self._seeds = torch.randint(1 << 62, (len(self),), generator=epoch_generator(seed, epoch))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self._seeds[index]))  # torch.manual_seed would seed GPUs, too
            return self.transform(image), label


class ImageNetDataModule(ImageDataModule):
    """ImageNet (ILSVRC2012) in class folders, ``train/CLASS/*`` and ``val/CLASS/*``, as torchvision unpacks it.

    The usual recipe: for training a random part of 8 to 100 % of an image, brought to ``size`` and mirrored in half of
    the cases; for evaluation the shorter side is brought to ``resize`` and the middle cut out. The 50,000 validation
    images serve for validation and test. Other images in such folders do as well.

    Args:
        data_dir: the directory that holds the folders ``train`` and ``val``.
        batch_size: images per training batch and process.
        size: pixels of a side of what the network sees.
        resize: pixels of the shorter side before the middle is cut out in evaluation, at least ``size``.
        workers: number of processes per training process that load batches; 0: the training process itself.
        seed: of order and augmentation; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: files are missing; the message says how to get them.

    Example:
        >>> from lightning_sparse.zoo.data import ImageNetDataModule
        >>> data = ImageNetDataModule("data/imagenet", batch_size=256)
    """

    def __init__(
        self,
        data_dir: str = "data/imagenet",
        batch_size: int = 256,
        size: int = 224,
        resize: int = 256,
        workers: int = 8,
        seed: int | None = None,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size, workers)
        checks.integer(1, "The papers' value is 224.", size=size)
        checks.integer(size, "It cannot be below size, which is cut out of it.", resize=resize)
        checks.path("It is the folder of the files.", data_dir=data_dir)
        self.data_dir = data_dir
        self.size = size
        self.resize = resize

    def prepare_data(self) -> None:
        """Raise if a folder is missing."""
        root = Path(self.data_dir)
        missing = [name for name in ("train", "val") if not (root / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"ImageNet is not whole in {root.resolve()}: {' and '.join(missing)} missing. Get "
                "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from image-net.org "
                "(after registration), put them there, and unpack them with torchvision.datasets.ImageNet(DIR, "
                '"train") and ImageNet(DIR, "val"); or name a directory with train/CLASS/* and val/CLASS/* with '
                "data_dir."
            )

    def setup(self, stage: str) -> None:
        """List the files."""
        self.prepare_data()  # under several processes and machines only some have called it
        folder = extra("torchvision.datasets", "examples").ImageFolder
        transforms = extra("torchvision.transforms", "examples")
        to_tensor = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        train = [transforms.RandomResizedCrop(self.size), transforms.RandomHorizontalFlip(), *to_tensor]
        val = transforms.Compose([transforms.Resize(self.resize), transforms.CenterCrop(self.size), *to_tensor])
        self.train = FolderImages(folder(Path(self.data_dir) / "train"), transforms.Compose(train))
        self.val = self.test = FolderImages(folder(Path(self.data_dir) / "val"), val)
