"""Parallel text for translation: subword tokens, in batches of about so many tokens each."""

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import rank_zero_info
from lightning_sparse.zoo.data.loader import DataModule, epoch_generator

__all__ = ["PADDING", "ParallelTextDataModule", "Sentences", "TranslationBatches", "group"]

PADDING, BEGIN, END, UNKNOWN = range(4)  # tokens that every vocabulary has
_LINES = 10_000  # lines that are encoded at once


class Sentences:
    """Sequences of tokens end to end in one tensor.

    Args:
        tokens: of all sequences, int32.
        lengths: of each sequence, int64, ``(count,)``.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self._starts = lengths.cumsum(0) - lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def collect(cls, parts: Iterable[list[list[int]]]) -> "Sentences":
        """Return all sequences of the parts; only one part at a time is held as lists, which take ten times as much."""
        tokens, lengths = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.int64)]
        for part in parts:
            tokens.append(torch.tensor(list(chain.from_iterable(part)), dtype=torch.int32))
            lengths.append(torch.tensor([len(sequence) for sequence in part], dtype=torch.int64))
        return cls(torch.cat(tokens), torch.cat(lengths))

    def where(self, chosen: Tensor) -> "Sentences":
        """Return the sequences for which a boolean is true."""
        return Sentences(self.tokens[chosen.repeat_interleave(self.lengths)], self.lengths[chosen])

    def padded(self, indices: Tensor) -> Tensor:
        """Return some sequences, filled up with ``PADDING`` to the longest, ``(count, length)``, int64."""
        bounds = zip(self._starts[indices].tolist(), self.lengths[indices].tolist(), strict=True)
        chosen = [self.tokens[start : start + length] for start, length in bounds]
        return pad_sequence(chosen, batch_first=True, padding_value=PADDING).long()


def group(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return where groups of consecutive items end, such that none holds more than ``max_tokens``, padding included.

    An item that is longer by itself is a group of its own.

    >>> group([2, 2, 3, 9, 1], 6)
    [2, 3, 4, 5]
    """
    ends: list[int] = []
    start = longest = 0
    for stop, length in enumerate(lengths):
        if stop > start and (stop - start + 1) * max(longest, length) > max_tokens:
            ends.append(stop)
            start, longest = stop, 0
        longest = max(longest, length)
    return [*ends, len(lengths)] if lengths else []


class TranslationBatches(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of sentences in batches of at most ``max_tokens`` tokens, counted as sentences times the longest of all.

    Each item is a batch: source ``(batch, length)`` and target ``(batch, length)``, int64, filled up with ``PADDING``.

    Args:
        sources: sentences of the one language.
        targets: those of the other, as many.
        max_tokens: of a batch, padding included; a longer pair is a batch of its own.
        bucketing: put pairs of like length together: by the longer of the two, then the shorter, and among equals at
            random in each epoch; otherwise batches are in the order of the pairs.
    """

    def __init__(self, sources: Sentences, targets: Sentences, max_tokens: int, bucketing: bool) -> None:
        self.sources = sources
        self.targets = targets
        self.longer = torch.maximum(sources.lengths, targets.lengths)
        self.bucketing = bucketing
        self.order = torch.arange(len(self.longer))
        self.begin_epoch(0, 0)
        self.ends = group(self.longer[self.order].tolist(), max_tokens)  # the same in each epoch: lengths are

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Draw the order of pairs of the same lengths in this epoch."""
        if self.bucketing:
            order = torch.randperm(len(self.longer), generator=epoch_generator(seed, epoch))
            for lengths in (torch.minimum(self.sources.lengths, self.targets.lengths), self.longer):
                order = order[lengths[order].argsort(stable=True)]
            self.order = order

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.ends[index - 1] if index else 0
        pairs = self.order[start : self.ends[index]]
        return self.sources.padded(pairs), self.targets.padded(pairs)


class ParallelTextDataModule(DataModule):
    """Parallel text for translation, such as WMT14 English-German: two files of aligned lines a split, in subwords.

    A batch is ``(source, target)``, tokens ``(batch, length)`` filled up with 0: a padding mask is ``source == 0``.
    Sources end with token 2; targets begin with 1 and end with 2; 3 stands for what the vocabulary does not know.
    Training batches hold pairs of like length, and their order and make-up depend on the seed and the epoch alone.

    Args:
        data_dir: the directory that holds the files, ``SPLIT.LANGUAGE`` such as ``train.en`` and ``train.de``.
        source: ending of the files to translate from.
        target: ending of the files to translate to.
        train: split to train on.
        val: split to validate on.
        test: split to test on and to translate.
        vocabulary: a SentencePiece model to use; None: one is learned from both training files and kept beside them.
        vocabulary_size: number of tokens to learn, shared by both languages, the four special ones included.
        max_tokens: of a batch and process: sentences times the longest of them, in either language.
        max_length: leave out training pairs with more tokens on either side, special ones included.
        seed: of the batches' make-up and order; None: that of ``seed_everything`` (0 if it was not called).

    Raises:
        ValueError: an argument is out of range, files do not have the same number of lines, or the vocabulary numbers
            its special tokens in another way.
        FileNotFoundError: files are missing; the message lists them.

    Example:
        >>> from lightning_sparse.zoo.data import ParallelTextDataModule
        >>> data = ParallelTextDataModule("wmt14", source="en", target="de", max_tokens=10240)

    Reference:
        SentencePiece: https://github.com/google/sentencepiece
    """

    def __init__(
        self,
        data_dir: str = "data/wmt14",
        source: str = "en",
        target: str = "de",
        train: str = "train",
        val: str = "val",
        test: str = "test",
        vocabulary: str | None = None,
        vocabulary_size: int = 37000,
        max_tokens: int = 10240,
        max_length: int = 256,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, None, seed)  # the sets' items are batches
        checks.integer(5, "Four tokens are special. The Transformer's value is 37000.", vocabulary_size=vocabulary_size)
        checks.integer(3, "A target has two marks beside its tokens.", max_length=max_length)
        checks.integer(max_length, "A batch must have room for a pair of max_length.", max_tokens=max_tokens)
        checks.path("It is the folder of the files.", data_dir=data_dir)
        for name, value in {"source": source, "target": target, "train": train, "val": val, "test": test}.items():
            checks.text("It is a part of the names of the files.", **{name: value})
        if vocabulary is not None:
            checks.path("It is a file of SentencePiece.", vocabulary=vocabulary)
        self.data_dir = data_dir
        self.languages = source, target
        self.splits = train, val, test
        self.vocabulary = vocabulary
        self.vocabulary_size = vocabulary_size
        self.max_tokens = max_tokens
        self.max_length = max_length

    def prepare_data(self) -> None:
        """Raise if files are missing; learn the vocabulary if there is none yet."""
        self._check_files()
        if self.vocabulary is None and not self._model().is_file():
            self._learn()

    def setup(self, stage: str) -> None:
        """Turn the text into batches of tokens."""
        self._check_files()
        self.tokenizer = extra("sentencepiece", "examples").SentencePieceProcessor(model_file=str(self._model()))
        numbers = [getattr(self.tokenizer, f"{name}_id")() for name in ("pad", "bos", "eos", "unk")]
        if numbers != [PADDING, BEGIN, END, UNKNOWN]:
            raise ValueError(
                f"vocabulary must number padding, begin, end and unknown 0, 1, 2 and 3, got {numbers} in "
                f"{self._model()}. Train it with pad_id=0, bos_id=1, eos_id=2, unk_id=3."
            )
        train, val, test = self.splits
        self.train = TranslationBatches(*self._fitting(*self._encode(train)), self.max_tokens, bucketing=True)
        self.val, self.test = (
            TranslationBatches(*self._encode(split), self.max_tokens, bucketing=False) for split in (val, test)
        )

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the text of sequences of tokens ``(batch, length)``, special ones left out; needs ``setup``."""
        text: list[str] = self.tokenizer.decode(tokens.tolist())
        return text

    def _file(self, split: str, language: str) -> Path:
        return Path(self.data_dir) / f"{split}.{language}"

    def _model(self) -> Path:
        if self.vocabulary is not None:
            return Path(self.vocabulary)
        return self._file(self.splits[0], f"{'-'.join(self.languages)}.{self.vocabulary_size}.model")

    def _check_files(self) -> None:
        files = [self._file(split, language) for split in self.splits for language in self.languages]
        files += [Path(self.vocabulary)] if self.vocabulary is not None else []
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Parallel text is not whole: {', '.join(missing)} missing. Each split is two plain text files with as "
                "many lines, one sentence each; name their directory with data_dir and their splits with train, val "
                "and test. WMT14 English-German comes from https://www.statmt.org/wmt14/translation-task.html."
            )

    def _lines(self, split: str, language: str) -> Iterator[str]:
        with open(self._file(split, language), encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.strip()

    def _learn(self) -> None:
        model = BytesIO()
        try:
            extra("sentencepiece", "examples").SentencePieceTrainer.train(
                sentence_iterator=chain.from_iterable(self._lines(self.splits[0], each) for each in self.languages),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.vocabulary_size,
                character_coverage=1.0,
                pad_id=PADDING,
                bos_id=BEGIN,
                eos_id=END,
                unk_id=UNKNOWN,
                minloglevel=1,
            )
        except RuntimeError as error:  # such as a vocabulary too large for the text
            raise ValueError(
                f"vocabulary_size must suit the training text, got {self.vocabulary_size}: {error}"
            ) from error
        partial = self._model().with_suffix(".part")
        partial.write_bytes(model.getvalue())
        partial.replace(self._model())  # never half a file

    def _encode(self, split: str) -> tuple[Sentences, Sentences]:
        """Return the tokens of each sentence with their marks, in both languages."""

        def parts(language: str, begins: bool) -> Iterator[list[list[int]]]:
            lines = self._lines(split, language)
            while some := list(islice(lines, _LINES)):
                yield self.tokenizer.encode(some, add_bos=begins, add_eos=True)

        source, target = self.languages
        sources, targets = Sentences.collect(parts(source, False)), Sentences.collect(parts(target, True))
        if len(sources) != len(targets):
            files = " and ".join(str(self._file(split, language)) for language in self.languages)
            raise ValueError(f"{files} must have the same number of lines, got {len(sources)} and {len(targets)}.")
        return sources, targets

    def _fitting(self, sources: Sentences, targets: Sentences) -> tuple[Sentences, Sentences]:
        """Leave out pairs with an empty side, or with one that is too long."""
        chosen = (sources.lengths > 1) & (targets.lengths > 2)
        chosen &= (sources.lengths <= self.max_length) & (targets.lengths <= self.max_length)
        left_out = len(chosen) - int(chosen.sum())
        if left_out == len(chosen):
            raise ValueError(f"max_length must leave pairs to train on, got {self.max_length} for {left_out} pairs.")
        if left_out:
            rank_zero_info(
                f"{left_out:,} of {len(chosen):,} training pairs are left out: empty, or longer than "
                f"{self.max_length} tokens."
            )
        return sources.where(chosen), targets.where(chosen)
