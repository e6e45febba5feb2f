"""LeNet-300-100 and LeNet-5-Caffe, the networks of the MNIST tables of DST and DFBST."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, channels_last, nn
from torch.nn.functional import max_pool2d, relu

from lightning_sparse.compat import checks
from lightning_sparse.zoo.models.classifier import Classifier

__all__ = ["LeNet5Caffe", "LeNet300"]


class LeNet300(Classifier):
    """LeNet-300-100: three fully connected layers with ReLU; 266,200 weights on MNIST.

    Args:
        inputs: number of pixels of an image: 784 for MNIST, 64 for digits.
        hidden: neurons of the two hidden layers.
        classes: number of classes.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Example:
        >>> from lightning_sparse.zoo.models import LeNet300
        >>> sum(p.numel() for name, p in LeNet300().named_parameters() if name.endswith("weight"))
        266200
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: Sequence[int] = (300, 100),
        classes: int = 10,
        **training: Any,
    ) -> None:
        super().__init__(classes, **training)
        checks.integer(1, "Images of 28 x 28 have 784.", inputs=inputs)
        checks.vector("LeNet-300-100 has (300, 100).", hidden=hidden)
        checks.pair(1, "LeNet-300-100 has (300, 100).", hidden=hidden)
        first, second = hidden
        self.fc1 = nn.Linear(inputs, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, ...)``."""
        x = relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(relu(self.fc2(x)))
        return logits


class LeNet5Caffe(Classifier):
    """LeNet-5-Caffe: convolutions of 20 and 50 filters 5 x 5, each with ReLU and 2 x 2 max pooling, then 500 neurons.

    430,500 weights. Caffe's own has no ReLU after the convolutions; the program of DST's authors, as here, does.

    Args:
        classes: number of classes.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Example:
        >>> from lightning_sparse.zoo.models import LeNet5Caffe
        >>> sum(p.numel() for name, p in LeNet5Caffe().named_parameters() if name.endswith("weight"))
        430500
    """

    def __init__(self, classes: int = 10, **training: Any) -> None:
        super().__init__(classes, **training)
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 1, 28, 28)``."""
        x = x.to(memory_format=channels_last)  # on a CPU this and the order below take half the time
        x = relu(max_pool2d(self.conv1(x), 2))
        x = relu(max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.fc2(relu(self.fc1(x.flatten(1))))
        return logits
