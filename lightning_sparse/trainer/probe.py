"""Probe: what training would compute, on copies of the module and of its loaders, without a trace in the run.

Scores that are taken before training need losses and gradients, and the run that follows must be the one that would
have been without them: the same batches in the same order, random draws, batch-norm statistics, metrics and logs.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse.compat.compiled import Uncompiled, copied
from lightning_sparse.compat.lightning import (
    DummyLogger,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    is_overridden,
    is_param_in_hook_signature,
    isolate_rng,
    parent,
)
from lightning_sparse.compat.lightning_private import training_loader

__all__ = ["Probe", "probing", "quantizes"]


class Probe:
    """A copy of the module and of its training data, to compute with at will inside ``probing``.

    Args:
        trainer: whose training is about to begin.
        module: the one it trains.
        names: of the weights to look at.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, names: list[str]) -> None:
        self.trainer = trainer
        self.module = _own_module(module, trainer)
        self.names = names
        self._drawn: list[Any] = []

    @property
    def weights(self) -> list[nn.Parameter]:
        """The copy's weights, in the order of ``names``."""
        parameters = dict(self.module.named_parameters())
        return [parameters[name] for name in self.names]

    def batches(self, count: int) -> Iterator[Any]:
        """Yield ``count`` batches as ``training_step`` gets them: on the device, after the hooks of their transfer."""
        for batch in self._read(count):
            # a copy, as the step may write to it
            batch = self.trainer.precision_plugin.convert_input(copy.deepcopy(batch))
            batch = self._hook("on_before_batch_transfer")(batch, 0)
            batch = self._hook("transfer_batch_to_device")(batch, self.trainer.strategy.root_device, 0)
            yield self._hook("on_after_batch_transfer")(batch, 0)

    def losses(self, count: int) -> Iterator[Tensor]:
        """Yield the loss of each of ``count`` batches; every call yields the same ones, as dropout repeats itself."""
        self._read(count)  # before the draws that are to be repeated
        with isolate_rng():
            for index, batch in enumerate(self.batches(count)):
                yield self.loss(batch, index)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Return the loss that the copy's ``training_step`` returns for a batch that is on the device."""
        try:
            output = self.output(batch, index)
        except MisconfigurationException:
            raise
        except Exception as error:  # of foreign code
            raise MisconfigurationException(
                f"The loss before training is that of {type(self.module).__name__}.training_step for batch {index} on "
                f"a copy of the module, which failed with {type(error).__name__}: {error}. What training_step needs "
                "must be there before, so make it in __init__, setup or on_fit_start, not in hooks that the Trainer "
                "calls later. Or use SynFlow or RandomPruning, which ask for no loss."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise MisconfigurationException(
                f"training_step must return a loss that depends on the weights, or a dict with one, got {loss!r} "
                f"for batch {index} before training."
            )
        return loss

    def output(self, batch: Any, index: int) -> Any:
        """Return what the copy's ``training_step`` returns for a batch that is on the device."""
        with self._precision():
            return self.step(batch, index)

    def step(self, batch: Any, index: int) -> Any:
        """Do as ``output``, in no other precision than that of the copy."""
        step: Callable[..., Any] = self.module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "The loss before training cannot be computed by a training_step with the argument dataloader_iter. "
                "Write training_step(self, batch, batch_idx)."
            )
        return step(batch, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)

    def gradient(self, count: int) -> list[Tensor]:
        """Return the gradient of the mean loss of ``count`` batches of every process, at least in single precision."""
        sums = [torch.zeros_like(W, dtype=whole(W).dtype, requires_grad=False) for W in self.weights]
        for loss in self.losses(count):
            for total, dP in zip(sums, torch.autograd.grad(loss, self.weights, materialize_grads=True), strict=True):
                total += dP.detach()  # in torch 2.4 the zeros of an unused weight require gradients
        return [self.over_ranks(total / count) for total in sums]

    def over_ranks(self, x: Tensor) -> Tensor:
        """Return the mean of ``x`` over processes."""
        mean: Tensor = self.trainer.strategy.reduce(x, reduce_op="mean")
        return mean

    # ------------------------------------------------------------------ inside

    def _read(self, count: int) -> list[Any]:
        if len(self._drawn) < count:
            self._drawn = _draw(self.trainer, count)
        return self._drawn[:count]

    def _hook(self, name: str) -> Callable[..., Any]:
        """Return a hook of the batch's transfer: the datamodule's if it has one, as in Lightning."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        base = parent(datamodule, "LightningDataModule")
        owner = datamodule if base is not None and is_overridden(name, datamodule, base) else self.module
        hook: Callable[..., Any] = getattr(owner, name)
        return hook

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the Trainer's context of a training step; float32 for mixed float16, which needs scaled losses."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.trainer.precision_plugin.train_step_context()
        return context


@contextmanager
def probing(trainer: Trainer, module: LightningModule, names: list[str]) -> Iterator[Probe]:
    """Give a ``Probe``; afterwards random generators and loggers are as before.

    Compiled parts of the module run uncompiled: they are few calls, and second derivatives need it.
    """
    loggers = trainer.loggers
    put_back = [
        _keep(generator)
        for loader in training_loader(trainer).flattened
        for held in ("dataset", "collate_fn")
        for generator in _generators(getattr(loader, held, None), set())
    ]
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        with isolate_rng(), torch.enable_grad(), closing(Uncompiled()):
            yield Probe(trainer, module, names)
    finally:
        trainer.loggers = loggers
        for back in put_back:
            back()


def whole(x: Tensor) -> Tensor:
    """Return ``x`` without its graph in single precision, or in double if it is so."""
    return x.detach() if x.dtype is torch.float64 else x.detach().float()


def quantizes(module: nn.Module) -> bool:
    """Tell whether a module is under quantization-aware training."""
    return any("FakeQuantize" in kind.__name__ for part in module.modules() for kind in type(part).__mro__)


# ---------------------------------------------------------------------- copies


def _own_module(module: LightningModule, trainer: Trainer) -> LightningModule:
    """Return a copy that can run ``training_step`` but logs nothing."""
    try:
        own = copied(module, module)
    except Exception as error:
        raise MisconfigurationException(
            f"{type(module).__name__} cannot be copied, and on itself scores would leave traces: {error}. "
            "Keep no results of earlier computations as attributes when trainer.fit starts (x.detach() can be copied)."
        ) from error
    own.trainer = trainer
    for part in own.modules():
        if is_a(part, "LightningModule"):
            part.log = part.log_dict = _ignore  # type: ignore[method-assign, assignment]
            if not part.automatic_optimization:
                _keep_still(part, trainer)
    return own


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


class _Still:
    """An optimizer or a learning-rate schedule that makes no step; all else is that of the real one."""

    zero_grad = _ignore

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate an optimizer's closure alone."""
        return closure() if callable(closure) else None

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Leave alone which parameters need gradients."""
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _keep_still(own: Any, trainer: Trainer) -> None:
    """Let a copy that optimizes manually compute its losses, and update nothing."""
    schedulers = [_Still(config.scheduler) for config in trainer.lr_scheduler_configs]
    optimizers = [_Still(optimizer) for optimizer in trainer.optimizers]
    own.optimizers = lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers
    own.lr_schedulers = lambda: (schedulers[0] if len(schedulers) == 1 else schedulers) or None
    for name in ("manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"):
        setattr(own, name, _ignore)


def _draw(trainer: Trainer, count: int) -> list[Any]:
    """Return the first ``count`` batches of copies of the training loaders."""
    combined = copy.copy(training_loader(trainer))
    assert combined is not None
    combined.flattened = [_own_loader(loader) for loader in combined.flattened]
    combined.limits = None
    batches = [item[0] for _, item in zip(range(count), combined, strict=False)]
    combined.reset()
    if len(batches) < count:
        raise MisconfigurationException(
            f"{count} batches were asked for before training, but the training loader has only {len(batches)}. "
            "Lower their number."
        )
    return batches


def _own_loader(loader: Any) -> Any:
    """Return a loader that can be drawn from while the original, and what it draws its order from, stays put.

    A dataset is shared, but for one that has a place of its own (iterable-style, in this process). Where the original
    has worker processes the copy has one.
    """
    try:
        if not isinstance(loader, DataLoader):
            return copy.deepcopy(loader)
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset) and not loader.num_workers:
            dataset = copy.deepcopy(dataset)
        memo = {id(loader.dataset): dataset}
        held = ("sampler", "batch_sampler", "generator")
        own = copy.copy(loader)
        vars(own).update({name: copy.deepcopy(getattr(loader, name), memo) for name in held}, dataset=dataset)
    except Exception as error:
        raise MisconfigurationException(
            f"{type(loader).__name__} cannot be copied, and drawing from itself would use up batches of the run: "
            f"{error}. Train from a DataLoader of a dataset with __getitem__, or let it have worker processes."
        ) from error
    vars(own).update(_iterator=None, num_workers=min(1, loader.num_workers), persistent_workers=False, pin_memory=False)
    return own


# ---------------------------------------------------------------------- random generators


def _generators(thing: Any, seen: set[int], depth: int = 6) -> Iterator[Any]:
    """Yield the random generators of torch, numpy and Python that ``thing`` holds, such as those of augmentation."""
    if depth == 0 or id(thing) in seen or isinstance(thing, (Tensor, type, ModuleType)):
        return
    seen.add(id(thing))
    kind = type(thing)
    numpys = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
    if numpys or isinstance(thing, (torch.Generator, random.Random)):
        yield thing
        return
    inner: Any = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    if len(inner) > 100:  # samples
        return
    for part in (*inner, *getattr(thing, "__dict__", {}).values()):
        yield from _generators(part, seen, depth - 1)


def _keep(generator: Any) -> Callable[[], Any]:
    """Return what brings a random generator back to its present state."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())
