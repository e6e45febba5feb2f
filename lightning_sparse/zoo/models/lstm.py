"""LSTM-a and LSTM-b, which read an image row by row: the recurrent networks of DST's MNIST table."""

from typing import Any

from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.zoo.models.classifier import Classifier

__all__ = ["SequenceLSTM"]


class SequenceLSTM(Classifier):
    """LSTM over the rows of an image, with a linear layer on the last output.

    Args:
        inputs: pixels of a row: 28 for MNIST.
        hidden: units of each layer: 128 is the paper's LSTM-a, 256 its LSTM-b.
        layers: number of LSTM layers.
        classes: number of classes.
        **training: the arguments of ``Classifier``: optimizer (default SGD, learning rate 0.01, momentum 0.9; the
            paper trains this network with Adam, learning rate 1e-3), ...

    Example:
        >>> from lightning_sparse.zoo.models import SequenceLSTM
        >>> [name for name, _ in SequenceLSTM(hidden=128).named_parameters() if "weight" in name]
        ['lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'lstm.weight_ih_l1', 'lstm.weight_hh_l1', 'fc.weight']
    """

    def __init__(
        self,
        inputs: int = 28,
        hidden: int = 128,
        layers: int = 2,
        classes: int = 10,
        **training: Any,
    ) -> None:
        super().__init__(classes, **training)
        for name, value in {"inputs": inputs, "hidden": hidden, "layers": layers}.items():
            checks.integer(1, "See the docstring for the paper's value.", high=1 << 20, **{name: value})
        self.inputs = inputs
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of images ``(batch, 1, rows, inputs)``."""
        output, _ = self.lstm(x.reshape(len(x), -1, self.inputs))
        logits: Tensor = self.fc(output[:, -1])
        return logits
