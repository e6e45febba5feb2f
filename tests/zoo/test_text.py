import random
import sys
from itertools import chain

import pytest
import sentencepiece
import torch

from lightning_sparse.zoo.data import ParallelTextDataModule, ResumableSampler
from lightning_sparse.zoo.data.text import PADDING, Sentences, TranslationBatches, group

WORDS = {"en": ["a", "red", "green", "tree", "house", "stands"], "de": ["ein", "rotes", "Haus", "Baum", "steht", "da"]}


@pytest.fixture
def text(tmp_path):
    """Pairs of 1 to 12 words: 200 for training, 9 and 7 otherwise."""
    draw = random.Random(0)
    for split, count in (("train", 200), ("val", 9), ("test", 7)):
        lengths = [draw.randint(1, 12) for _ in range(count)]
        for language, words in WORDS.items():
            lines = [" ".join(draw.choices(words, k=min(12, n + draw.randint(0, 2)))) for n in lengths]
            (tmp_path / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def made(folder, **kwargs):
    data = ParallelTextDataModule(str(folder), **{"vocabulary_size": 60, "max_tokens": 120, "max_length": 60, **kwargs})
    data.prepare_data()
    data.setup("fit")
    return data


def sentences(lengths):
    """Sentences whose first token is their number, counted from 10."""
    return Sentences.collect([[[10 + n, *[5] * (length - 1)] for n, length in enumerate(lengths)]])


def batches(count=300, max_tokens=100, bucketing=True):
    draw = random.Random(1)
    lengths = [draw.randint(1, 30) for _ in range(count)]
    other = [max(1, length + draw.randint(-3, 3)) for length in lengths]
    return TranslationBatches(sentences(lengths), sentences(other), max_tokens, bucketing)


def numbers(data):
    """The numbers of the pairs in each batch."""
    return [(data[n][0][:, 0] - 10).tolist() for n in range(len(data))]


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "ends"),
    [
        ([1, 1, 1, 1], 2, [2, 4]),
        ([1, 2, 3, 4], 6, [2, 3, 4]),  # 2 x 2, then 3 x 3 would be 9; 2 x 4 would be 8
        ([3, 1, 1], 9, [3]),  # the longest counts wherever it stands
        ([9, 1], 4, [1, 2]),
        ([1, 9], 4, [1, 2]),
        ([5], 5, [1]),
        ([], 5, []),
    ],
)
def test_groups_hold_so_many_tokens_with_padding(lengths, max_tokens, ends):
    assert group(lengths, max_tokens) == ends


@pytest.mark.parametrize("bucketing", [True, False])
def test_every_pair_is_in_one_batch_and_none_is_too_large(bucketing):
    data = batches(bucketing=bucketing)
    assert sorted(chain.from_iterable(numbers(data))) == list(range(300))
    for n in range(len(data)):
        source, target = data[n]
        assert len(source) * max(source.shape[1], target.shape[1]) <= 100
        assert torch.equal(source[:, 0], target[:, 0])


def test_sentences_are_filled_up_with_padding():
    padded = sentences([2, 4, 1]).padded(torch.tensor([2, 0]))
    assert padded.tolist() == [[12, PADDING], [10, 5]]
    assert padded.dtype == torch.int64


def test_sentences_are_the_same_in_however_many_parts_they_come():
    parts = [[[4, 5], [6]], [], [[7, 8, 9]]]
    collected = Sentences.collect(parts)
    assert collected.tokens.tolist() == [4, 5, 6, 7, 8, 9]
    assert collected.lengths.tolist() == [2, 1, 3]
    chosen = collected.where(torch.tensor([True, False, True]))
    assert chosen.padded(torch.arange(2)).tolist() == [[4, 5, 0], [7, 8, 9]]


def test_bucketing_saves_padding():
    def share(data):
        padded = torch.cat([tokens.flatten() for n in range(len(data)) for tokens in data[n]])
        return (padded != PADDING).double().mean()

    assert share(batches()) > 0.9 > 0.75 > share(batches(bucketing=False))
    assert len(batches()) < len(batches(bucketing=False))


def test_the_make_up_of_batches_depends_on_seed_and_epoch_alone():
    data, again = batches(), batches()
    data.begin_epoch(1, 2)
    first = numbers(data)
    again.begin_epoch(1, 3)
    assert numbers(again) != first
    assert len(again) == len(data)
    again.begin_epoch(1, 2)
    assert numbers(again) == first


def test_without_bucketing_pairs_stay_in_order():
    data = batches(bucketing=False)
    data.begin_epoch(1, 2)
    assert list(chain.from_iterable(numbers(data))) == list(range(300))


# ---------------------------------------------------------------------- data module


def test_text_becomes_marked_tokens_and_text_again(text):
    data = made(text)
    source, target = data.test[0]
    lines = {language: (text / f"test.{language}").read_text().splitlines() for language in WORDS}
    assert data.decode(source) == lines["en"][: len(source)]
    assert data.decode(target) == lines["de"][: len(target)]
    assert (target[:, 0] == 1).all()
    assert not (source[:, 0] == 1).any()
    for tokens in (source, target):
        assert ((tokens == 2).sum(1) == 1).all()
        assert torch.equal((tokens == PADDING).sum(1), tokens.shape[1] - 1 - (tokens == 2).int().argmax(1))


def test_loaders_give_whole_batches(text):
    data = made(text)
    assert sum(len(source) for source, _ in data.train_dataloader()) == 200
    for loader, count in ((data.val_dataloader(), 9), (data.test_dataloader(), 7)):
        assert sum(len(source) for source, _ in loader) == count


def test_a_resumed_pass_has_the_batches_it_would_have_had(text):
    data = made(text, seed=4)
    loader, resumed = data.train_dataloader(), made(text, seed=4).train_dataloader()
    loader.sampler.set_epoch(3)
    whole = list(loader)
    stopped = iter(loader)
    for _ in range(4):
        next(stopped)
    resumed.sampler.set_epoch(3)
    resumed.load_state_dict(loader.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 4
    for one, other in zip(whole[4:], rest, strict=True):
        assert all(map(torch.equal, one, other))


def test_processes_share_the_batches(text):
    data = made(text, seed=4).train
    shares = [list(ResumableSampler(data, num_replicas=2, rank=rank, seed=4)) for rank in (0, 1)]
    assert set(shares[0] + shares[1]) == set(range(len(data)))
    assert len(shares[0]) == len(shares[1]) == -(-len(data) // 2)


def test_the_vocabulary_is_learned_once_and_kept(text, monkeypatch):
    first = made(text)
    model = text / "train.en-de.60.model"
    assert first.tokenizer.vocab_size() == 60
    again = text / "again"
    again.mkdir()
    for file in text.glob("train.??"):
        (again / file.name).write_bytes(file.read_bytes())
    for split in ("val", "test"):
        for language in WORDS:
            (again / f"{split}.{language}").write_bytes((text / f"{split}.{language}").read_bytes())
    made(again)
    assert (again / model.name).read_bytes() == model.read_bytes()
    monkeypatch.setattr(ParallelTextDataModule, "_learn", None)
    made(text)
    given = made(again, vocabulary=str(model), vocabulary_size=999)
    assert given.tokenizer.vocab_size() == 60


def test_a_vocabulary_that_numbers_its_marks_in_another_way_is_refused(text):
    sentencepiece.SentencePieceTrainer.train(
        input=str(text / "train.en"), model_prefix=str(text / "other"), vocab_size=15, minloglevel=1
    )
    with pytest.raises(ValueError, match=r"vocabulary must number .* 0, 1, 2 and 3, got \[-1, 1, 2, 0\]"):
        made(text, vocabulary=str(text / "other.model"))


def test_empty_and_long_pairs_are_left_out_of_training_alone(text, caplog):
    for language, words in (("en", ["", "red"]), ("de", ["Haus", "Haus " * 60])):
        for split in ("train", "val"):
            with open(text / f"{split}.{language}", "a") as file:
                file.writelines(f"{line}\n" for line in words)
    with caplog.at_level("INFO"):
        data = made(text)
    assert len(data.train.longer) == 200
    assert len(data.val.longer) == 11
    assert "2 of 202 training pairs are left out: empty, or longer than 60 tokens" in caplog.text


def test_files_of_different_lengths_are_refused(text):
    with open(text / "val.de", "a") as file:
        file.write("Haus\n")
    with pytest.raises(ValueError, match=r"val.en and .*val.de must have the same number of lines, got 9 and 10"):
        made(text)


def test_missing_text_is_named_with_the_remedy(text):
    (text / "test.de").unlink()
    with pytest.raises(FileNotFoundError, match=r"not whole: .*test.de missing.*as many lines.*statmt.org"):
        made(text)
    with pytest.raises(FileNotFoundError, match=r"nowhere.model missing"):
        ParallelTextDataModule(str(text), vocabulary="nowhere.model").prepare_data()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"vocabulary_size": 4}, "vocabulary_size must be an integer of at least 5, got 4"),
        ({"max_length": 2}, "max_length must be an integer of at least 3, got 2"),
        ({"max_tokens": 100, "max_length": 200}, "max_tokens must be an integer of at least 200, got 100"),
    ],
)
def test_bad_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        ParallelTextDataModule(**argument)


def test_something_must_be_left_to_train_on(text):
    for language, words in WORDS.items():
        (text / f"train.{language}").write_text(f"{' '.join(words)}\n" * 200)
    with pytest.raises(ValueError, match="max_length must leave pairs to train on, got 3 for 200 pairs"):
        made(text, max_length=3, vocabulary_size=30)


def test_a_vocabulary_must_suit_the_text(text):
    with pytest.raises(
        ValueError, match=r"vocabulary_size must suit the training text, got 500: .*Vocabulary size too"
    ):
        made(text, vocabulary_size=500)


def test_a_missing_package_names_its_extra(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModuleNotFoundError, match=r"sentencepiece is not installed.*\[examples\]"):
        made(text)
