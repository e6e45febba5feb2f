"""The Transformer for translation, of AutoSparse's WMT14 result."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torchmetrics.text import Perplexity

from lightning_sparse.compat import checks
from lightning_sparse.zoo.models.base import LRSchedulerCallable, NetworkModule, OptimizerCallable
from lightning_sparse.zoo.models.lr_schedules import InverseSquareRootLR

__all__ = ["Transformer", "adam", "inverse_square_root"]

Batch = tuple[Tensor, Tensor]


def adam(params: Iterable[Any]) -> torch.optim.Optimizer:
    """Return Adam with a peak learning rate of 8.46e-4 and betas 0.9 and 0.997, AutoSparse's for the Transformer."""
    return torch.optim.Adam(params, lr=8.46e-4, betas=(0.9, 0.997), eps=1e-9)


def inverse_square_root(optimizer: torch.optim.Optimizer) -> InverseSquareRootLR:
    """Return a warm-up of 4000 steps and a fall with the square root of the step."""
    return InverseSquareRootLR(optimizer, 4000)


class Transformer(NetworkModule):
    """Encoder and decoder for translation (Vaswani et al., 2017), by default the base model: 6 + 6 layers of width 512.

    Source, target and output share one embedding, whose rows are the output layer's weights; norms follow the
    residual connections, and positions are sines. The embedding is not made sparse unless asked for, which leaves the
    first and the last layer dense, as AutoSparse does.

    A batch is ``(source, target)``, whole numbers ``(batch, length)``, filled up with ``padding``; targets begin with
    ``begin``, and both end with ``end``. Logs ``train_loss`` (smoothed), ``val_loss`` and ``val_perplexity``,
    ``test_loss`` and ``test_perplexity`` once an epoch, as averages over tokens. Predictions are greedy.

    Args:
        vocabulary: number of tokens that source and target share, special ones included.
        width: of embeddings and layers, a multiple of ``heads``, even.
        layers: of the encoder and of the decoder.
        heads: of each attention.
        hidden: neurons of the hidden layer of each feed-forward network.
        dropout: of embeddings, sublayers, attention weights and hidden layers, in [0, 1].
        padding: token that fills up.
        begin: token before the first of a target.
        end: token after the last.
        optimizer: makes the optimizer from the parameters; its rate is the peak.
        lr_scheduler: makes the scheduler from the optimizer; it moves with each step.
        label_smoothing: share of the target that is spread over the vocabulary; in training alone.
        decay_norm_and_bias: whether the optimizer's weight decay is for the parameters of norms and biases, too.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        vocabulary: int = 37000,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
        padding: int = 0,
        begin: int = 1,
        end: int = 2,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = inverse_square_root,
        label_smoothing: float = 0.1,
        decay_norm_and_bias: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, "step", label_smoothing, decay_norm_and_bias)
        for name, value in {"layers": layers, "heads": heads, "hidden": hidden}.items():
            checks.integer(1, "See the docstring for the base model's value.", **{name: value})
        checks.integer(4, "Three tokens are special.", vocabulary=vocabulary)
        checks.fraction("The paper's value is 0.1.", dropout=dropout)
        checks.integer(2, "The base model's value is 512.", width=width)
        for name, value in {"padding": padding, "begin": begin, "end": end}.items():
            checks.integer(0, "It is the number of a token.", **{name: value})
        if width % heads or width % 2:
            raise ValueError(f"width must be an even multiple of heads, {heads}, got {width}.")
        if len({padding, begin, end}) < 3 or not all(0 <= token < vocabulary for token in (padding, begin, end)):
            raise ValueError(
                f"padding, begin and end must be different tokens below vocabulary, {vocabulary}, "
                f"got {padding}, {begin} and {end}."
            )
        self.padding, self.begin, self.end = padding, begin, end
        self.embedding = nn.Embedding(vocabulary, width, padding)
        self.dropout = nn.Dropout(dropout)
        # not nn.Transformer, which adds a norm behind the last layer of each stack
        encoder = nn.TransformerEncoderLayer(width, heads, hidden, dropout, batch_first=True)
        decoder = nn.TransformerDecoderLayer(width, heads, hidden, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[padding].zero_()
        self.val_perplexity = Perplexity(ignore_index=padding)
        self.test_perplexity = Perplexity(ignore_index=padding)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits ``(batch, target length, vocabulary)`` of the token after each token of ``target``."""
        return self.decode(target, self.encode(source), source == self.padding)

    def encode(self, source: Tensor) -> Tensor:
        """Return the encoder's output ``(batch, length, width)``."""
        out: Tensor = self.encoder(self._embed(source), src_key_padding_mask=source == self.padding)
        return out

    def decode(self, target: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        """Return logits ``(batch, target length, vocabulary)``.

        Args:
            target: tokens ``(batch, target length)``.
            memory: the encoder's output.
            padded: where the source is filled up, ``(batch, source length)``.
        """
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        out = self.decoder(
            self._embed(target),
            memory,
            tgt_mask=later,
            tgt_key_padding_mask=target == self.padding,
            memory_key_padding_mask=padded,
            tgt_is_causal=True,
        )
        return linear(out, self.embedding.weight)

    @torch.no_grad()
    def translate(self, source: Tensor, max_length: int = 256) -> Tensor:
        """Return the most likely next token again and again: ``(batch, length)``, from ``begin`` on.

        Args:
            source: tokens ``(batch, length)``.
            max_length: stop here at the latest. Rows that ended before are filled up with padding.
        """
        memory, padded = self.encode(source), source == self.padding
        target = torch.full((len(source), 1), self.begin, device=source.device)
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while target.shape[1] < max_length and not ended.all():
            token = self.decode(target, memory, padded)[:, -1].argmax(1).masked_fill(ended, self.padding)
            target = torch.cat([target, token[:, None]], 1)
            ended |= token == self.end
        return target

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the smoothed cross-entropy of the target's tokens."""
        loss, _, count = self._loss(batch, self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("val", self.val_perplexity, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("test", self.test_perplexity, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return translations, tokens ``(batch, length)``."""
        return self.translate(batch[0])

    def _embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        embedded = math.sqrt(width) * self.embedding(tokens)
        out: Tensor = self.dropout(embedded + _positions(tokens.shape[1], width, tokens.device))
        return out

    def _loss(self, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor, int]:
        """Return the mean cross-entropy of all tokens, the logits and the number of tokens."""
        source, target = batch
        logits, following = self(source, target[:, :-1]), target[:, 1:]
        loss = cross_entropy(
            logits.flatten(0, 1), following.flatten(), ignore_index=self.padding, label_smoothing=label_smoothing
        )
        return loss, logits, int((following != self.padding).sum())

    def _evaluate(self, stage: str, perplexity: Any, batch: Batch) -> None:
        loss, logits, count = self._loss(batch, 0.0)
        perplexity(logits, batch[1][:, 1:])
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=count)
        self.log(f"{stage}_perplexity", perplexity, batch_size=count)


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Return ``(length, width)``: ``sin(p / 10000 ** (2 i / width))`` in column ``2 i``, the cosine in ``2 i + 1``."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
