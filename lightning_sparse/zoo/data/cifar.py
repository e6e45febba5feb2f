"""CIFAR-10 and CIFAR-100."""

from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.data.images import Batch, ByteImageDataModule

__all__ = ["CIFAR10DataModule", "CIFAR100DataModule"]


class _CIFARDataModule(ByteImageDataModule):
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    dataset: ClassVar[str]

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        download: bool = False,
        padding: int = 4,
        flip: bool = True,
        rotation: float = 0.0,
        val_from_train: int = 0,
        seed: int | None = None,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(batch_size, padding, flip, rotation, val_from_train, seed, eval_batch_size)
        checks.path("It is the folder of the files.", data_dir=data_dir)
        checks.flag(download=download)
        self.data_dir = data_dir
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if that is allowed, or raise if they are missing."""
        cifar = self._class()
        if self.download:
            cifar(self.data_dir, download=True)
        folder = Path(self.data_dir) / cifar.base_folder
        files = [name for name, _ in (*cifar.train_list, *cifar.test_list)] + [cifar.meta["filename"]]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.dataset} is not whole in {folder.resolve()}: {', '.join(missing)} missing. Fetch {cifar.url}, "
                f"unpack it (tar xzf {cifar.filename}) and name the directory above {cifar.base_folder} with data_dir, "
                "or set download=True to fetch it."
            )

    def setup(self, stage: str) -> None:
        """Load the images."""
        self.prepare_data()  # under several processes and machines only some have called it
        self._take(self._load(train=True), self._load(train=False), self.mean, self.std)

    def _load(self, train: bool) -> Batch:
        cifar = self._class()(self.data_dir, train=train)
        return torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(cifar.targets)

    def _class(self) -> Any:
        return getattr(extra("torchvision.datasets", "examples"), self.dataset)


class CIFAR10DataModule(_CIFARDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 in ten classes, kept in memory as bytes (180 MB).

    Training images are cut out at random from the image with 4 black pixels around it, and a random half of them is
    mirrored, as in the papers. As there, too, the test images serve for validation; ``val_from_train`` takes the
    validation images away from training instead.

    Args:
        data_dir: the directory that holds ``cifar-10-batches-py/`` (CIFAR-100: ``cifar-100-python/``).
        batch_size: images per training batch and process.
        download: fetch the files if they are missing.
        padding: black pixels around a training image before it is cut out; 0: do not.
        flip: mirror a random half of the training images left to right.
        rotation: turn training images by a random angle of at most so many degrees either way.
        val_from_train: take so many images, evenly spread over the training set, for validation; they are not
            augmented.
        seed: of order and augmentation; None: that of ``seed_everything`` (0 if it was not called).
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: files are missing and ``download`` is False; the message lists them.

    Example:
        >>> from lightning_sparse.zoo.data import CIFAR10DataModule
        >>> data = CIFAR10DataModule("data", batch_size=64, download=True)
    """

    dataset = "CIFAR10"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100DataModule(_CIFARDataModule):
    """CIFAR-100: as CIFAR-10, in a hundred classes.

    For its arguments see :class:`~lightning_sparse.zoo.data.CIFAR10DataModule`.

    Memory-efficient DST's recipe also has ``rotation=15``.

    Example:
        >>> from lightning_sparse.zoo.data import CIFAR100DataModule
        >>> data = CIFAR100DataModule("data", batch_size=128, rotation=15)
    """

    dataset = "CIFAR100"
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
