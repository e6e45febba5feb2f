"""The networks of the papers as LightningModules."""

from lightning_sparse.models.classifier import Classifier
from lightning_sparse.models.lenet import LeNet5Caffe, LeNet300
from lightning_sparse.models.lstm import SequenceLSTM

__all__ = ["Classifier", "LeNet5Caffe", "LeNet300", "SequenceLSTM"]
