"""MobileNetV1, of AutoSparse's ImageNet table, and MobileNetV2, of GGR's tables."""

from typing import Any, Literal

from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.models.classifier import Classifier

__all__ = ["MobileNetV1", "MobileNetV2"]

# output channels and stride of the 13 depthwise separable convolutions
_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


class MobileNetV1(Classifier):
    """MobileNetV1 (Howard et al., 2017): depthwise separable convolutions; 4.2 M parameters on ImageNet.

    Args:
        classes: number of classes.
        width: factor on all channels.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, **training: Any) -> None:
        super().__init__(classes, **training)
        checks.at_least(1 / 32, "It multiplies 32 channels, of which one must remain.", width=width)
        channels = int(width * 32)
        layers = self._convolution(3, channels, 3, 2, 1)
        for filters, stride in ((int(width * filters), stride) for filters, stride in _SEPARABLE):
            layers += self._convolution(channels, channels, 3, stride, channels)
            layers += self._convolution(channels, filters, 1, 1, 1)
            channels = filters
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _convolution(channels: int, filters: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(filters), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, height, width)``."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


class MobileNetV2(Classifier):
    """MobileNetV2 (Sandler et al., 2018), torchvision's; 3.5 M parameters on ImageNet.

    Args:
        classes: number of classes.
        width: factor on all channels.
        stem: ``"cifar"`` for small images: strides of 1 in the first convolution and in the second stage, so that
            images of 32 x 32 are 4 x 4 at the end; ``"imagenet"``: strides of 2, as in the paper.
        dropout: before the linear layer, in [0, 1].
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        classes: int = 1000,
        width: float = 1.0,
        stem: Literal["cifar", "imagenet"] = "imagenet",
        dropout: float = 0.2,
        **training: Any,
    ) -> None:
        super().__init__(classes, **training)
        checks.one_of(("cifar", "imagenet"), stem=stem)
        checks.at_least(1 / 32, "It multiplies 32 channels, of which one must remain.", width=width)
        checks.fraction("torchvision's value is 0.2.", dropout=dropout)
        stride = 1 if stem == "cifar" else 2
        # expansion, channels, number of blocks, stride of the first: the paper's Table 2
        stages = [
            [1, 16, 1, 1],
            [6, 24, 2, stride],
            [6, 32, 3, 2],
            [6, 64, 4, 2],
            [6, 96, 3, 1],
            [6, 160, 3, 2],
            [6, 320, 1, 1],
        ]
        network = extra("torchvision.models", "examples").MobileNetV2
        self.net = network(classes, width_mult=width, inverted_residual_setting=stages, dropout=dropout)
        self.net.features[0][0].stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, height, width)``."""
        logits: Tensor = self.net(x)
        return logits
