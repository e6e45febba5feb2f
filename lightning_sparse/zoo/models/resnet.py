"""Residual networks: ResNet-18 and -50, CIFAR's ResNet-56 and wide residual networks."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.models.classifier import Classifier

__all__ = ["ResNet18", "ResNet50", "ResNet56", "WideResNet"]


class _TorchvisionResNet(Classifier):
    """A ResNet of torchvision under the name ``net``."""

    def __init__(self, name: str, classes: int, stem: str, **training: Any) -> None:
        super().__init__(classes, **training)
        checks.one_of(("cifar", "imagenet"), stem=stem)
        self.net = getattr(extra("torchvision.models", "examples"), name)(num_classes=classes)
        if stem == "cifar":
            self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.net.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, height, width)``."""
        logits: Tensor = self.net(x)
        return logits


class ResNet18(_TorchvisionResNet):
    """ResNet-18 (He et al., 2016), torchvision's; 11.2 M parameters on CIFAR-100 and 11.7 M on ImageNet.

    Args:
        classes: number of classes.
        stem: ``"cifar"`` for small images: a first convolution of 3 x 3 with stride 1 and no pooling after it;
            ``"imagenet"``: 7 x 7 with stride 2 and a pooling.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...
    """

    def __init__(self, classes: int = 10, stem: Literal["cifar", "imagenet"] = "cifar", **training: Any) -> None:
        super().__init__("resnet18", classes, stem, **training)


class ResNet50(_TorchvisionResNet):
    """ResNet-50 (He et al., 2016), torchvision's with the stride in the 3 x 3 convolution; 25.56 M parameters.

    Args:
        classes: number of classes.
        stem: ``"cifar"`` for small images: a first convolution of 3 x 3 with stride 1 and no pooling after it;
            ``"imagenet"``: 7 x 7 with stride 2 and a pooling.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...
    """

    def __init__(self, classes: int = 1000, stem: Literal["cifar", "imagenet"] = "imagenet", **training: Any) -> None:
        super().__init__("resnet50", classes, stem, **training)


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside an identity, which is strided and filled up with zeros where the shape changes."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride = stride
        self.new = filters - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.new:
            x = x[:, :, :: self.stride, :: self.stride]
            x = pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return relu(x + y)


class ResNet56(Classifier):
    """ResNet-56 for 32 x 32 images (He et al., 2016): three stages of nine blocks with shortcuts without parameters.

    0.85 M weights on CIFAR-10 at width 1; convolutions from normal distributions of variance ``2 / (9 in)``.

    Args:
        classes: number of classes.
        width: factor on the stages' 16, 32 and 64 channels.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, classes: int = 10, width: float = 1.0, **training: Any) -> None:
        super().__init__(classes, **training)
        checks.at_least(1 / 16, "It multiplies 16 channels, of which one must remain.", width=width)
        first, *_ = stages = [int(width * channels) for channels in (16, 32, 64)]
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        blocks: list[nn.Module] = []
        channels = first
        for number, filters in enumerate(stages):
            for place in range(9):
                blocks.append(_Block(channels, filters, 2 if number and not place else 1))
                channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, 32, 32)``."""
        x = self.blocks(relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Two 3 x 3 convolutions, each behind its batch norm and ReLU; a change of shape has a 1 x 1 convolution."""

    def __init__(self, channels: int, filters: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False) if channels != filters else None

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv1(y)
        out: Tensor = x + self.conv2(self.dropout(relu(self.bn2(y))))
        return out


class WideResNet(Classifier):
    """Wide residual network for 32 x 32 images (Zagoruyko and Komodakis, 2016), as the program of DST's authors.

    11.0 M parameters with depth 16 and widening 8, 17.1 M with 16 and 10, 23.4 M with 28 and 8.

    Args:
        depth: number of layers: ``6 n + 4`` with n blocks in each of the three stages; 16 and 28 in DST.
        widen: factor on the stages' 16, 32 and 64 channels; 8 and 10 in DST.
        classes: number of classes.
        dropout: between the two convolutions of a block, in [0, 1].
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, depth: int = 16, widen: int = 8, classes: int = 10, dropout: float = 0.0, **training: Any
    ) -> None:
        super().__init__(classes, **training)
        checks.integer(1, "DST's values are 8 and 10.", widen=widen)
        checks.fraction("DST's value is 0.", dropout=dropout)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n of at least 1, such as 16, 22 or 28, got {depth}.")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for number, filters in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for place in range((depth - 4) // 6):
                blocks.append(_WideBlock(channels, filters, 2 if number and not place else 1, dropout))
                channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, 32, 32)``."""
        x = relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
