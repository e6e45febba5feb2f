"""What all data modules share: batches whose order, and what is random in them, depend on seed and epoch alone.

The order comes from the seed and the epoch, not from the state of a random generator, and the loader's place within an
epoch goes into checkpoints: a run that is resumed, even in the middle of an epoch, sees the batches it would have seen.
Sets that change at random what they hand out (augmentation) have a ``begin_epoch(seed, epoch)``: they draw for each of
their items by its place in the set, so that it looks the same whichever process, worker or batch it falls to.
"""

import os
import random
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Generator
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import PACKAGE

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    LightningDataModule = import_module(PACKAGE).LightningDataModule

__all__ = ["DataModule", "ResumableLoader", "ResumableSampler", "epoch_generator"]


def epoch_generator(seed: int, epoch: int) -> Generator:
    """Return a generator for what is drawn in an epoch: not that of the sampler, whose seed is the sum of the two."""
    return Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))


class ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler that can leave out the first ``start`` of its items in the next pass."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that knows its place: Lightning writes it into checkpoints and gives it back.

    Its sampler must be a :class:`~lightning_sparse.zoo.data.ResumableSampler`. What was handed out before the
    checkpoint is not loaded again. With another sampler, which Lightning puts there for ``overfit_batches``, every pass
    begins at the beginning.
    """

    _taken = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator: runs when the epoch is known
        place, self._resume = self._resume, None
        skip = 0
        if isinstance(self.sampler, ResumableSampler):
            if place is not None and place[0] == self.sampler.epoch:
                skip = place[1]
            if hasattr(self.dataset, "begin_epoch"):
                self.dataset.begin_epoch(self.sampler.seed, self.sampler.epoch)
            self.sampler.start = skip * (self.batch_size or 1)
        for self._taken, batch in enumerate(super().__iter__(), skip + 1):
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were handed out."""
        return {"epoch": getattr(self.sampler, "epoch", -1), "batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were handed out, if the next pass is of that epoch."""
        self._resume = state["epoch"], state["batches"]
        self._taken = state["batches"]


class DataModule(LightningDataModule):
    """Base of the data modules: a subclass's ``setup`` sets ``train``, ``val`` and ``test``.

    Args:
        batch_size: items per training batch and process; None: the items of the sets are whole batches.
        eval_batch_size: items per batch in evaluation; None likewise.
        seed: of the order of the training items and of augmentation; None: that of ``seed_everything`` (0 if it was
            not called).
        workers: number of processes that load batches; 0: the training process itself.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]

    def __init__(
        self, batch_size: int | None, eval_batch_size: int | None, seed: int | None = None, workers: int = 0
    ) -> None:
        super().__init__()
        if seed is not None:
            checks.seed("Leave it out to use the run's seed.", seed=seed)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.workers = workers

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches, shuffled by seed and epoch and shared out among processes."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = ResumableSampler(self.train, num_replicas=processes, rank=rank, shuffle=True, seed=seed)
        return ResumableLoader(self.train, batch_size=self.batch_size, sampler=sampler, **self._options(self.train))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return self._in_order(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._in_order(self.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._in_order(self.test)

    def _in_order(self, items: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(items, batch_size=self.eval_batch_size, **self._options(items))

    def _options(self, items: Dataset[Any]) -> dict[str, Any]:
        whole = self.batch_size is None or hasattr(items, "__getitems__")
        return {"num_workers": self.workers, "collate_fn": _as_it_is if whole else None}


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: what the set returned is a batch."""
    return batch
