"""The papers' data as LightningDataModules whose runs resume bit for bit, even in the middle of an epoch."""

from lightning_sparse.zoo.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_sparse.zoo.data.digits import DigitsDataModule
from lightning_sparse.zoo.data.folder import ImageFolderDataModule, TinyImageNetDataModule
from lightning_sparse.zoo.data.imagenet import ImageNetDataModule
from lightning_sparse.zoo.data.images import ByteImages, ImageDataModule, TensorImages
from lightning_sparse.zoo.data.loader import ResumableLoader, ResumableSampler
from lightning_sparse.zoo.data.mnist import MNISTDataModule
from lightning_sparse.zoo.data.text import ParallelTextDataModule

__all__ = [
    "ByteImages",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MNISTDataModule",
    "ParallelTextDataModule",
    "ResumableLoader",
    "ResumableSampler",
    "TensorImages",
    "TinyImageNetDataModule",
]
