"""The networks of the papers as LightningModules."""

from lightning_sparse.zoo.models.base import NetworkModule
from lightning_sparse.zoo.models.classifier import Classifier
from lightning_sparse.zoo.models.lenet import LeNet5Caffe, LeNet300
from lightning_sparse.zoo.models.lr_schedules import InverseSquareRootLR, WarmupCosineLR, WarmupMultiStepLR
from lightning_sparse.zoo.models.lstm import SequenceLSTM
from lightning_sparse.zoo.models.mobilenet import MobileNetV1, MobileNetV2
from lightning_sparse.zoo.models.resnet import ResNet18, ResNet50, ResNet56, WideResNet
from lightning_sparse.zoo.models.transformer import Transformer
from lightning_sparse.zoo.models.vgg import VGG16, VGG16ImageNet

__all__ = [
    "VGG16",
    "Classifier",
    "InverseSquareRootLR",
    "LeNet5Caffe",
    "LeNet300",
    "MobileNetV1",
    "MobileNetV2",
    "NetworkModule",
    "ResNet18",
    "ResNet50",
    "ResNet56",
    "SequenceLSTM",
    "Transformer",
    "VGG16ImageNet",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WideResNet",
]
