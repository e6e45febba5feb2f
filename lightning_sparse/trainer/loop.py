"""attach: a method in a training loop of one's own, such as one with Fabric, driven by the steps of the optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import CombinedLoader, LightningModule
from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.optimizers import hook_step
from lightning_sparse.trainer.agreement import saved
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.fit import Processes

__all__ = ["Attached", "attach"]

_EPOCHS = 100  # parts of a training whose number of epochs is not given

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def attach(
    method: SparseCallback,
    module: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | MakeOptimizer,
    *,
    steps: int,
    steps_per_epoch: int | None = None,
    loss: Loss | None = None,
    batches: Iterable[Any] = (),
    schedulers: Sequence[Any] = (),
    scaler: Any = None,
) -> "Attached":
    """Train sparse in a loop of your own: the optimizer's steps drive the method as the Trainer would.

    Use what is returned as a context manager around the loop. Call the module itself for each training batch, not its
    parts: the method sees the start of a batch there. When the context ends, the module is a plain one with exact
    zeros, and the method stays readable.

    Args:
        method: any of this package.
        module: that you train; also one that Fabric or ``DistributedDataParallel`` has wrapped.
        optimizer: of its parameters, or several; or a function that makes one of the parameters, which
            ``storage="sparse"`` needs, since it exchanges layers before: ``Attached.optimizer`` is what it made.
        steps: number of steps of the whole training that each optimizer makes, at least 1. Schedules of the method
            end with it.
        steps_per_epoch: number of them that count as an epoch, at least 1, for what methods do epoch by epoch.
            Default: a hundredth of ``steps``.
        loss: ``loss(module, batch)`` returns the loss of a batch. SNIP, GraSP and Wanda need it.
        batches: batches of the training on the module's device, from which SNIP, GraSP, SynFlow and Wanda take their
            scores. They are read from a copy, which leaves the order of your own batches as it is.
        schedulers: of the learning rate, which LotteryTicket rewinds; they must step once in each step.
        scaler: the ``torch.amp.GradScaler`` of the loop, if it has one.

    Raises:
        TypeError: ``method`` is no method, ``module`` no module, or ``optimizer`` no optimizer.
        ValueError: a number is out of range, or the method needs ``loss`` and ``batches``.
        MisconfigurationException: when the context is entered, whatever a Trainer's fit would refuse.

    Example:
        >>> import torch
        >>> from lightning_sparse import RigL, attach
        >>> module = torch.nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> with attach(RigL(sparsity=0.9), module, optimizer, steps=50) as sparse:
        ...     for _ in range(50):
        ...         optimizer.zero_grad()
        ...         module(torch.randn(8, 20)).square().mean().backward()
        ...         optimizer.step()
        >>> sparse.sparsity, int(module.weight.count_nonzero())
        (0.9, 20)
    """
    checks.integer(1, "It is the length of the whole training.", steps=steps)
    if steps_per_epoch is not None:
        checks.integer(1, "Leave it out for a hundredth of steps.", steps_per_epoch=steps_per_epoch)
    if not isinstance(method, SparseCallback):
        raise TypeError(f"method must be one such as RigL(sparsity=0.9), got {type(method).__name__}.")
    plain = _plain(module)
    checks.module(module=plain)
    if getattr(method, "runs_network", False) and (loss is None or not batches):
        raise ValueError(
            f"loss and batches must be given for {method!r}, which runs the network to score connections before the "
            "first step. Give loss=lambda module, batch: ... and batches=loader."
        )
    given = [optimizer] if not isinstance(optimizer, Sequence) else [*optimizer]
    given = [_plain(each) for each in given]
    if not all(_steps(each) or (len(given) == 1 and callable(each)) for each in given):
        kinds = ", ".join(type(each).__name__ for each in given)
        raise TypeError(f"optimizer must be an optimizer, several, or a function that makes one, got {kinds}.")
    length = Length(steps, steps_per_epoch or math.ceil(steps / _EPOCHS))
    return Attached(method, plain, given, length, loss, batches, schedulers, scaler)


class Length(NamedTuple):
    """How long a training is.

    Attributes:
        steps: of the whole training.
        an_epoch: of an epoch.
    """

    steps: int
    an_epoch: int

    @property
    def epochs(self) -> int:
        """Number of epochs, of which the last may be shorter."""
        return math.ceil(self.steps / self.an_epoch)

    def epoch(self, step: int) -> int:
        """Return the epoch of a step; there is none after the last."""
        return min(step // self.an_epoch, self.epochs - 1)


class Attached:
    """What ``attach`` returns: the training that a method is in, as a context manager.

    Attributes:
        method: the callback; all that can be read of it can be read in and after the training.
        step: number of steps that were made.
    """

    def __init__(
        self,
        method: SparseCallback,
        module: nn.Module,
        optimizers: Sequence[Any],
        length: Length,
        loss: Loss | None,
        batches: Iterable[Any],
        schedulers: Sequence[Any],
        scaler: Any,
    ) -> None:
        self.method = method
        self.step = 0
        self._length = length
        self._module = _lightning_module(module, optimizers, loss)
        self._trainer = _Trainer(method, self._module, length, batches, schedulers, scaler)
        self._optimizers = optimizers
        self._handles: list[Any] = []
        self._made: dict[int, int] = {}  # steps of each optimizer
        self._epoch = -1  # the one that has begun
        self._in_batch = False
        self._state: Mapping[str, Any] | None = None  # of a checkpoint

    # ------------------------------------------------------------------ what users read

    @property
    def optimizer(self) -> Any:
        """The first optimizer, or the one that was made when the context was entered."""
        return self._trainer.optimizers[0] if self._trainer.optimizers else self._optimizers[0]

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all selected weights."""
        return self.method.sparsity

    @property
    def density(self) -> float:
        """Share of nonzero weights over all selected weights."""
        return self.method.density

    @property
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is nonzero: a boolean tensor of the weight's shape, by parameter name."""
        return self.method.masks

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the module and the optimizers: tensors and plain values only."""
        made = [self._made.get(id(optimizer), 0) for optimizer in self._trainer.optimizers]
        return {"step": self.step, "made": made, "method": self.method.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, which the context takes up when it is entered.

        Load the module before that, and the optimizers and schedulers within the context: some methods add parameters
        to the optimizers.

        Raises:
            RuntimeError: the context has been entered, or layers are held by the nonzeros alone.
        """
        if self._handles:
            raise RuntimeError("load_state_dict must be called before the context is entered. Call it before `with`.")
        if getattr(self.method, "storage", "masked") != "masked":
            raise RuntimeError(
                f"{self.method!r} cannot go on in a loop of your own, since its layers hold the nonzeros alone. Use "
                "storage='masked', or a Trainer, which resumes both."
            )
        self._state = state_dict

    # ------------------------------------------------------------------ the training begins and ends

    def __enter__(self) -> "Attached":
        """Take the weights over, as at the start of a fit."""
        try:
            self._begin()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        trainer, module = self._trainer, self._module
        if self._state is not None:
            self.step = self._state["step"]
            self._epoch = self._length.epoch(self.step - 1) if self.step else -1
        self._call("setup", "fit")
        module.configure_model()
        if self._state is not None:
            self.method.load_state_dict(saved(self.method, self._state["method"]))
        trainer.optimizers = module.configure_optimizers()
        made = [0] * len(trainer.optimizers) if self._state is None else self._state["made"]
        self._made = {id(each): count for each, count in zip(trainer.optimizers, made, strict=True)}
        self._see_step()
        self._handles.append(module.own.register_forward_pre_hook(self._called, with_kwargs=True))
        for optimizer in trainer.optimizers:  # before the method's own hooks
            self._handles += hook_step(optimizer, partial(self._before_step, optimizer), _nothing)
        self._call("on_fit_start")
        for optimizer in trainer.optimizers:  # after them
            self._handles += hook_step(optimizer, _nothing, partial(self._after_step, optimizer))
        self._call("on_train_start")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave a plain module with exact zeros, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if error is None:
            self._call("on_train_epoch_end")
            self._call("on_train_end")
        else:
            self._call("on_exception", error)
        self._call("teardown", "fit")

    # ------------------------------------------------------------------ steps

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See that the module is called: with the first training batch after a step a new one begins."""
        if module is self._module.own and module.training and torch.is_grad_enabled() and not self._in_batch:
            self._begin_batch(_Call(args, kwargs))

    def _begin_batch(self, batch: Any) -> None:
        self._in_batch = True
        epoch = self._length.epoch(self.step)
        if epoch != self._epoch:
            if self._epoch >= 0:
                self._call("on_train_epoch_end")
            self._epoch = epoch
            self._call("on_train_epoch_start")
        self._call("on_train_batch_start", batch, self.step - epoch * self._length.an_epoch)

    def _before_step(self, optimizer: Any, stepped: Any, args: Any, kwargs: Any) -> None:
        """Make the gradients the method's, if they are there: a closure is still to compute them."""
        if not self._in_batch:
            self._begin_batch(None)  # only parts of the module have been called
        if len(args) == 1 and kwargs.get("closure") is None:
            self._call("on_before_backward", None)  # there was at least one
            self._call("on_before_optimizer_step", optimizer)

    def _after_step(self, optimizer: Any, stepped: Any, args: Any, kwargs: Any) -> None:
        self._made[id(optimizer)] += 1
        self.step = max(self._made.values())
        self._see_step()
        self._call("on_train_batch_end", None, None, 0)
        self._in_batch = False

    def _see_step(self) -> None:
        self._trainer.global_step, self._trainer.current_epoch = self.step, self._length.epoch(self.step)

    def _call(self, hook: str, *arguments: Any) -> None:
        getattr(self.method, hook)(self._trainer, self._module, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attached":
        """Stay the same: the hooks of a copied module hear nothing."""
        return self


def _nothing(*_: Any) -> None:
    pass


def _steps(optimizer: Any) -> bool:
    """Tell whether this is an optimizer, and not what makes one."""
    return hasattr(optimizer, "step") and not isinstance(optimizer, type)


def _plain(thing: Any) -> Any:
    """Return the module or the optimizer within what Fabric and DistributedDataParallel have put around it."""
    around = {"_FabricModule": "module", "DistributedDataParallel": "module", "_FabricOptimizer": "optimizer"}
    inner = [around[kind.__name__] for kind in type(thing).__mro__ if kind.__name__ in around]
    return _plain(getattr(thing, inner[0])) if inner else thing


# ---------------------------------------------------------------------- what takes the place of Lightning's objects


class _Call(NamedTuple):
    """What a module is called with, in the place of a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Module(LightningModule):
    """A LightningModule with the parts, parameters and names of a plain module.

    Attributes:
        own: the plain module.
    """

    own: nn.Module
    make: Sequence[Any]
    loss: Loss | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain module."""
        return self.own(*args, **kwargs)

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch; of a call, the sum of what the module returns."""
        if not isinstance(batch, _Call):
            assert self.loss is not None
            return self.loss(self, batch)
        outputs = tensors(self.own(*batch.args, **batch.kwargs))
        return torch.stack([x.double().sum() for x in outputs if x.is_floating_point()]).sum()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the plain module, which may be a layer itself, and its parts."""
        yield from self.own.named_modules(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the plain module or a part of it."""
        return self.own.get_submodule(target)

    def __getattr__(self, name: str) -> Any:
        """Return what the plain module has beside its parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["own"], name)

    def configure_optimizers(self) -> list[Any]:
        """Return the optimizers, or make one."""
        return [each if _steps(each) else each(self.own.parameters()) for each in self.make]


def _lightning_module(module: nn.Module, optimizers: Sequence[Any], loss: Loss | None) -> _Module:
    """Return a LightningModule of the plain module's class name, whose parts, parameters and buffers are its own."""
    kind: type[_Module] = type(type(module).__name__, (_Module,), {})
    made = kind()
    held = {name: vars(module)[name] for name in ("_modules", "_parameters", "_buffers")}
    vars(made).update(held, own=module, make=optimizers, loss=loss)
    made.automatic_optimization = loss is not None  # losses can be asked for
    return made


class _Precision:
    """The loop casts by itself.

    Attributes:
        scaler: of the losses, None without one.
    """

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    def convert_input(self, batch: Any) -> Any:
        return batch

    def train_step_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    forward_context = train_step_context


class _Trainer:
    """What methods ask of a Trainer, of a loop that has none."""

    accumulate_grad_batches = 1
    ckpt_path = None
    datamodule = None
    fast_dev_run = False
    loggers = ()

    def __init__(
        self,
        method: SparseCallback,
        module: _Module,
        length: Length,
        batches: Iterable[Any],
        schedulers: Sequence[Any],
        scaler: Any,
    ) -> None:
        self.callbacks = [method]
        self.lightning_module = module
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=s, interval="step", frequency=1) for s in schedulers]
        self.precision_plugin = _Precision(scaler)
        self.strategy = Processes(next((p.device for p in module.parameters()), torch.device("cpu")))
        self.state = SimpleNamespace(fn="fit")
        self.fit_loop = SimpleNamespace(_combined_loader=CombinedLoader(batches, "sequential"))
        self.estimated_stepping_batches = self.max_steps = length.steps
        self.num_training_batches, self.max_epochs = length.an_epoch, length.epochs
        self.global_step = self.current_epoch = 0
        self.world_size, self.global_rank = self.strategy.world_size, self.strategy.global_rank
        self.is_global_zero = self.global_rank == 0
