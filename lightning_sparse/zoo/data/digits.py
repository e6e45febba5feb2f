"""scikit-learn's handwritten digits."""

import torch

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.data.images import ImageDataModule, TensorImages

__all__ = ["DigitsDataModule"]


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8, values scaled to [0, 1]. Needs no download.

    80 % of each class are for training; the others serve for validation and test alike.

    Args:
        batch_size: images per training batch and process.
        seed: of the order of the training images; None: that of ``seed_everything`` (0 if it was not called).
        split_seed: of the split into training and validation.
        eval_batch_size: images per batch in evaluation, which changes speed and memory alone.

    Example:
        >>> from lightning_sparse.zoo.data import DigitsDataModule
        >>> data = DigitsDataModule()
        >>> data.setup("fit")
        >>> data.train.images.shape, len(data.val)
        (torch.Size([1437, 1, 8, 8]), 360)
    """

    def __init__(
        self, batch_size: int = 64, seed: int | None = None, split_seed: int = 0, eval_batch_size: int = 1000
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size)
        checks.integer(0, "0 is the usual split.", high=2**32 - 1, split_seed=split_seed)
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        images, labels = extra("sklearn.datasets", "examples").load_digits(return_X_y=True)
        split = extra("sklearn.model_selection", "examples").train_test_split
        train, held = split(range(len(labels)), test_size=0.2, stratify=labels, random_state=self.split_seed)
        whole = TensorImages(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))
        self.train: TensorImages = TensorImages(*whole.__getitems__(train))
        self.val = self.test = TensorImages(*whole.__getitems__(held))
