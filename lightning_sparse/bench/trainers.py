"""In a Trainer: steps with a method, Lightning's hooks alone, the monitor."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sparse import SparsityMonitor
from lightning_sparse.bench.measure import hardware, middle
from lightning_sparse.bench.networks import METHODS, NETWORKS, batch_for
from lightning_sparse.compat.lightning import PACKAGE, Callback, LightningModule, Trainer
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["Plain", "fit_seconds", "hooks", "monitor", "trainer"]


class Plain(LightningModule):
    """A network as a LightningModule, with nothing logged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum and weight decay."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class _Repeated(Dataset[list[Tensor]]):
    """One batch, handed out ``count`` times."""

    def __init__(self, batch: list[Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.batch


def fit_seconds(
    module: LightningModule,
    batch: list[Tensor],
    steps: int,
    callbacks: list[Callback],
    logger: Any = False,
    device: str = "cpu",
    **options: Any,
) -> float:
    """Return the seconds of a step in a Trainer that does nothing else, all of ``fit`` shared among its steps."""
    trainer = Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "max_epochs": 1, **options},
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(_Repeated(batch, steps), batch_size=None))
    return (time.perf_counter() - start) / steps


def trainer(arguments: argparse.Namespace) -> None:
    """Print, for each method, the time of a step in a Trainer over that of the same Trainer without a callback."""
    build, batch = NETWORKS[arguments.network][0], batch_for(arguments.network, arguments.batch)

    def fit(callbacks: list[Callback], steps: int) -> float:
        return fit_seconds(Plain(build()), batch, steps, callbacks, device=arguments.device)

    steps = max(5, int(arguments.seconds / fit([], 5)))
    print(f"{arguments.network}, batch {arguments.batch}, in a Trainer, {hardware(arguments.device)}")
    for name in arguments.methods.split(","):
        fit([METHODS[name]()], steps)
        triples = [(fit([], steps), fit([METHODS[name]()], steps), fit([], steps)) for _ in range(arguments.rounds)]
        ratios = [2 * sparse / (before + after) for before, sparse, after in triples]
        dense = 1e3 * statistics.median(before for before, _, _ in triples)
        print(f"{name:18s} step time / dense: {middle(ratios)}; dense step {dense:.3f} ms", flush=True)


class _Idle(SparseCallback):
    """A method that does nothing: what remains is what Lightning's hooks cost."""

    masks: dict[str, Tensor] = {}  # noqa: RUF012

    def attach(self, choices: object, optimizers: object, resumed: bool) -> None:
        """Nothing, as all verbs here."""

    def attach_added(self, choices: object, optimizer: object) -> None:
        pass

    def before_step(self, optimizer: object, share: float, scale: float) -> None:
        pass

    def before_update(self, optimizer: object) -> None:
        pass

    def after_update(self, optimizer: object) -> None:
        pass

    def abort_update(self) -> None:
        pass

    def refuse_choices(self, choices: object) -> None:
        pass


def hooks(arguments: argparse.Namespace) -> None:
    """Print what a step costs more in a Trainer with a callback that has all hooks but does no arithmetic."""
    batch = [torch.randn(1, 2), torch.zeros(1, dtype=torch.long)]

    def fit(callbacks: list[Callback]) -> float:
        return 1e6 * fit_seconds(Plain(nn.Linear(2, 2)), batch, arguments.steps or 2000, callbacks)

    print(f"a step of a 2 x 2 layer in a Trainer, {hardware('cpu')}")
    fit([_Idle()])
    pairs = [(fit([]), fit([_Idle()])) for _ in range(arguments.rounds)]
    bare = statistics.median(bare for bare, _ in pairs)
    print(f"hooks: {middle([hooked - bare for bare, hooked in pairs], 0)} us a step more than {bare:.0f}")


class _TimedMonitor(SparsityMonitor):
    """Adds up the time that its own hooks take."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = {}
        for name in ("batch_start", "batch_end", "epoch_end", "start", "end"):
            setattr(self, f"on_train_{name}", partial(self._timed, name, getattr(self, f"on_train_{name}")))

    def _timed(self, name: str, hook: Callable[..., None], *args: Any) -> None:
        first = name == "batch_start" and not self._file.head
        start = time.perf_counter()
        hook(*args)
        key = "begin" if first else name
        self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - start


def monitor(arguments: argparse.Namespace) -> None:
    """Print the share of SparsityMonitor's hooks in the time of an epoch in a Trainer that logs."""
    build, batch = NETWORKS[arguments.network][0], batch_for(arguments.network, arguments.batch)
    steps = arguments.steps or 938  # MNIST's
    CSVLogger = import_module(f"{PACKAGE}.loggers").CSVLogger
    print(f"{arguments.network}, batch {arguments.batch}, {steps} steps an epoch, {hardware(arguments.device)}")
    for name in arguments.methods.split(","):
        ratios, spent = [], []
        for _ in range(arguments.rounds + 1):  # the first warms up
            timed = _TimedMonitor()
            callbacks: list[Callback] = [timed] if name == "none" else [METHODS[name](), timed]
            with TemporaryDirectory() as folder:
                logger = CSVLogger(folder)
                whole = steps * fit_seconds(Plain(build()), batch, steps, callbacks, logger, arguments.device)
            rest = whole - sum(timed.spent.values())
            ratios.append((whole - timed.spent["begin"]) / rest)
            spent.append({**timed.spent, "step": rest})
        parts = {key: 1e3 * statistics.median(row[key] for row in spent[1:]) for key in spent[0]}
        print(
            f"{name:18s} time with the monitor / without: {middle(ratios[1:], 4)}; "
            f"before the first step {parts['begin']:.0f} ms more; an epoch's end {parts['epoch_end']:.1f} ms, "
            f"a step {1e3 * (parts['batch_start'] + parts['batch_end']) / steps:.1f} us "
            f"of {1e3 * parts['step'] / steps:.0f}",
            flush=True,
        )
