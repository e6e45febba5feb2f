"""VGG-16: DST's form for CIFAR, whose narrow one is that of memory-efficient DST, and the one for ImageNet of GGR."""

from typing import Any

from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.models.classifier import Classifier

__all__ = ["VGG16", "VGG16ImageNet"]

# output channels of the 3 x 3 convolutions of the five blocks; each block ends with a pooling that halves the image
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Classifier):
    """VGG-16 for 32 x 32 images, of DST's authors: 13 convolutions and 2 linear layers with batch norm; 15.0 M weights.

    Their initialisation, too: convolutions and linear layers from normal distributions of variance ``2 / (9 out)`` and
    1e-4, scales of the convolutions' batch norms 0.5.

    Args:
        classes: number of classes.
        width: factor on all channels and on the hidden linear layer; 0.25 is the narrow VGG-16 of memory-efficient DST,
            whose own "width" counts in units of that.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, classes: int = 10, width: float = 1.0, **training: Any) -> None:
        super().__init__(classes, **training)
        checks.at_least(1 / 64, "It multiplies 64 channels, of which one must remain.", width=width)
        features: list[nn.Module] = []
        channels = 3
        for number, block in enumerate(_BLOCKS):
            for filters in (int(width * filters) for filters in block):
                features += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
                channels = filters
            features.append(nn.MaxPool2d(2) if number < 4 else nn.AvgPool2d(2))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Linear(channels, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class VGG16ImageNet(Classifier):
    """VGG-16 with linear layers of 4096 neurons, as torchvision has it; 138.4 M parameters on ImageNet.

    GGR trains it on Tiny ImageNet without its last block: ``classes=200, image_size=64, blocks=4``, 58.8 M parameters.

    Args:
        classes: number of classes.
        image_size: height and width of the images in pixels, a multiple of ``2 ** blocks``.
        blocks: blocks of convolutions, 1 to 5, each of which halves the image.
        batch_norm: a batch norm after each convolution.
        dropout: of the two hidden linear layers, in [0, 1].
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9), ...

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        classes: int = 1000,
        image_size: int = 224,
        blocks: int = 5,
        batch_norm: bool = False,
        dropout: float = 0.5,
        **training: Any,
    ) -> None:
        super().__init__(classes, **training)
        checks.fraction("The paper's value is 0.5.", dropout=dropout)
        checks.integer(1, "VGG-16 has 5.", blocks=blocks)
        checks.integer(1, "ImageNet's is 224.", image_size=image_size)
        if blocks > len(_BLOCKS):
            raise ValueError(f"blocks must be at most 5, got {blocks}.")
        if image_size % 2**blocks:
            raise ValueError(f"image_size must be a multiple of 2 ** blocks, {2**blocks}, got {image_size}.")
        layers = [channels for block in _BLOCKS[:blocks] for channels in (*block, "M")]
        self.features = extra("torchvision.models.vgg", "examples").make_layers(layers, batch_norm)
        inputs = _BLOCKS[blocks - 1][-1] * (image_size // 2**blocks) ** 2
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, classes),
        )
        for module in self.modules():  # as torchvision
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
