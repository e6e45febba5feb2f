"""MNIST."""

from pathlib import Path

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.data.images import ImageDataModule, TensorImages

__all__ = ["MNISTDataModule"]


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
        >>> from lightning_sparse.zoo.data import MNISTDataModule
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
        checks.path("It is the folder of the files.", data_dir=data_dir)
        checks.flag(download=download)
        checks.flag(normalise=normalise)
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
