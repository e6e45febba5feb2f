"""SparseCallback: Lightning's hooks become a method's verbs. The one file of the core that knows the Trainer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.arguments import parameters, refusing_by_name
from lightning_sparse.compat.lightning import (
    Callback,
    DDPStrategy,
    LightningModule,
    MisconfigurationException,
    SingleDeviceStrategy,
    Trainer,
    check_trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_sparse.layers.selection import FROZEN, ParameterChoice, select_parameters, table

__all__ = ["SparseCallback", "Storage", "averaging", "refuse_other_sparsity", "refuse_other_weights", "unscales"]


Storage = Literal["masked", "sparse"]


class SparseCallback(Callback, ABC):
    """Base of every sparse-training method.

    A step of training passes through these verbs, which a family of methods defines:

    - ``attach``: fit start: take the chosen weights over, from a checkpoint's state if there is one
    - ``attach_more``: the same for weights that join an optimizer later
    - ``begin_epoch``: set what changes from epoch to epoch
    - ``before_step``: once a step, when gradients are whole: make them the gradients of the method
    - ``enter_step``: the optimizer's update is about to run
    - ``after_step``: the update has run: bring back exact zeros
    - ``leave_step``: the update was broken off: bring back exact zeros

    Args:
        include: glob patterns on parameter names such as ``["encoder.*"]``; only weights that match are made sparse,
            whatever their layer. Default: the weights of linear, convolution, recurrent and attention layers.
        exclude: glob patterns on the names of weights that stay dense, such as ``["*.head.weight"]``.
        log_every_n_steps: log also every so many optimizer steps; by default at the end of each epoch alone. The
            Trainer writes step values at every ``Trainer(log_every_n_steps)``-th step only: give that number, or a
            multiple of it, between which the Trainer repeats the latest values.
    """

    #: what a family keeps of each weight, by parameter name: with the number of its elements, ``size``
    _weights: Mapping[str, Any]

    # What ties the callback to one fit: see _detached.
    _handles: list[Any]
    _optimizers: list[Optimizer]
    _prepared: set[int]
    _depth: dict[int, int]
    _group_sizes: dict[int, int]
    _frozen: dict[int, list[torch.nn.Parameter]]
    _backwards: int
    _logged_step: int
    _warned: set[str]
    _module: LightningModule | None
    _trainer: Trainer | None

    #: ``"masked"``: weights are dense tensors with exact zeros; ``"sparse"``: layers that hold the nonzeros alone
    storage: Storage = "masked"

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] = (), log_every_n_steps: int | None = None
    ) -> None:
        self.include = checks.patterns(include=include)
        self.exclude = checks.patterns(exclude=exclude) or []
        if log_every_n_steps is not None:
            checks.integer(1, "Leave it out to log once an epoch.", log_every_n_steps=log_every_n_steps)
        self.log_every_n_steps = log_every_n_steps
        self._weights = {}
        self._restored = False
        self._begun = {"epochs": 0, "steps": 0}  # of the Trainer before this fit
        self.run_seed = 0
        self.__dict__.update(_detached())

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the refusal of an unknown argument name the method that was called, not a base that it hands it to."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = refusing_by_name(cls.__init__)  # type: ignore[method-assign]  # "Cannot assign to a method"

    # ------------------------------------------------------------------ what a family of methods defines

    @abstractmethod
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:
        """Take over the weights of ``choices`` (or release those of an earlier fit and take over these).

        Args:
            choices: all of them selected and owned by one of ``optimizers``.
            optimizers: the Trainer's.
            resumed: the state that was loaded belongs to these weights and must fit them.
        """

    @abstractmethod
    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Take over weights that joined ``optimizer`` after the fit started."""

    @abstractmethod
    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Set what changes from epoch to epoch; ``epochs`` is their number, None if it is not known."""

    @abstractmethod
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:
        """Turn the weights' gradients into the method's.

        Args:
            optimizer: only its weights have whole gradients now.
            share: the part of the accumulation window that had a backward pass, 1 as a rule: a penalty added to the
                loss of every micro-batch has this weight. 0: gradients, if there are any, are those of an earlier step
                (in the batch-norm epoch of StochasticWeightAveraging), and the weights must stay as they are.
            scale: the factor that the gradients still carry (fused optimizers under AMP), else 1.
        """

    @abstractmethod
    def enter_step(self, optimizer: Optimizer) -> None:
        """Prepare the parameters of ``optimizer`` for its update."""

    @abstractmethod
    def after_step(self, optimizer: Optimizer) -> None:
        """Bring back exact zeros after the update of ``optimizer``."""

    @abstractmethod
    def leave_step(self) -> None:
        """Bring back exact zeros in the middle of an update that was broken off."""

    @property
    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """Where each weight is nonzero: a boolean tensor of the weight's shape, by parameter name.

        Empty before the first fit, at whose start the weights are chosen; readable during it and afterwards.
        """

    @property
    def total_steps(self) -> float:
        """Number of optimizer steps of the whole fit; infinite if nothing tells how many."""
        assert self._trainer is not None
        trainer: Any = self._trainer
        steps = float(trainer.estimated_stepping_batches)
        if steps < 0:  # -1 is max_steps, which is not set
            return math.inf
        if not any(self._begun.values()):
            return steps
        # a later fit of the Trainer, whose max_epochs and max_steps count the earlier ones, too
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        by_steps = float(trainer.max_steps - self._begun["steps"]) if trainer.max_steps >= 0 else math.inf
        if math.isinf(batches) or epochs is None or epochs < 0:
            return by_steps
        an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        return min(float(an_epoch * (epochs - self._begun["epochs"])), by_steps)

    def mask(self, name: str) -> Tensor:
        """Return one of ``masks``, without making the others."""
        return self.masks[name]

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: that of its nonzero ones, unless a method differs."""
        return self.layer_density

    @property
    def connections(self) -> dict[str, Tensor]:
        """A tensor for each weight, another object once connections have moved; empty: any step may move them."""
        return {}

    @property
    def held(self) -> list[Mapping[str, Any]]:
        """What is kept of each weight: tensors, also those of module and optimizer, and containers of them."""
        return [vars(weight) for weight in self._weights.values()]

    @property
    def levels(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, by parameter name, if the method has thresholds."""
        return {}

    #: connections move after the fit has begun
    moves: bool = True

    #: the step that moves connections computes the gradients of all weights
    dense_gradient_to_move: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings by name: the arguments of the class and of the bases that take its ``options``."""
        found: dict[str, Any] = {}
        for parameter in parameters(type(self)):
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                name = parameter.name
                held = "sparsity_target" if name == "sparsity" else name  # `sparsity` is the present one
                found.setdefault(name, getattr(self, held))
        return found

    @property
    def watched(self) -> dict[str, float]:
        """More scalars to log, by name."""
        return {}

    def report_trouble(self) -> None:
        """Warn, at the end of an epoch, of what only this family can see."""

    # ------------------------------------------------------------------ what users read

    @property
    def layer_count(self) -> dict[str, int]:
        """Number of nonzero weights of each layer, by parameter name; empty before the first fit, as ``masks``."""
        return {name: _count(mask) for name, mask in self.masks.items()}

    @property
    def layer_density(self) -> dict[str, float]:
        """Share of nonzero weights of each layer, by parameter name; empty before the first fit, as ``masks``."""
        return {name: count / self._weights[name].size for name, count in self.layer_count.items()}

    @property
    def density(self) -> float:
        """Share of nonzero weights over all selected weights."""
        return sum(self.layer_count.values()) / self._size

    @property
    def gradient_density(self) -> float:
        """Share of all selected weights whose gradient is used."""
        shares = self.layer_gradient_density
        return sum(share * float(self._weights[name].size) for name, share in shares.items()) / self._size

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all selected weights: ``1 - density``."""
        return 1 - self.density

    # ------------------------------------------------------------------ Lightning's hooks

    @property
    def state_key(self) -> str:
        """Identify the state in a checkpoint by method and choice of layers."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of the other Lightning package; forget an earlier fit, which an exception may have ended."""
        check_trainer(trainer, self)
        self._release()
        if stage == "fit":
            self._restored = False
            # those of a checkpoint, if one is loaded now
            self._begun = {"epochs": trainer.current_epoch, "steps": trainer.global_step}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the weights, take them over, and show which they are."""
        self._check(trainer)
        choices = select_parameters(pl_module, self.include, self.exclude)
        self._mark_unowned(choices, trainer.optimizers)
        self._refuse_overlap(choices, trainer)
        self._refuse_storage(choices)
        self._warn_of_averages(trainer)
        self.run_seed = trainer.strategy.broadcast(torch.initial_seed())
        self.attach([choice for choice in choices if choice.reason is None], trainer.optimizers, self._restored)
        self._restored = False
        self._optimizers = [*trainer.optimizers]
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            self._handles.append(optimizer.register_step_post_hook(self._after_update))
        for optimizer in trainer.optimizers:
            self._remember(optimizer, choices)
        self._module, self._trainer = pl_module, trainer
        every, theirs = self.log_every_n_steps, max(getattr(trainer, "log_every_n_steps", 1), 1)
        if every is not None and trainer.loggers and every % theirs:
            rank_zero_warn(
                f"log_every_n_steps={every} of {type(self).__name__} is not a multiple of the Trainer's {theirs}, "
                "so not all of its values reach the logger. "
                f"Set Trainer(log_every_n_steps={every}) or a divisor of it."
            )
        rank_zero_info(table(f"{type(self).__name__} of lightning_sparse", choices))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch that a resumed run may be in the middle of."""
        self._logged_step = trainer.global_step
        self.begin_epoch(trainer.current_epoch, _epochs(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Anneal and redistribute."""
        self.begin_epoch(trainer.current_epoch, _epochs(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget updates that an exception has broken off; raise if the optimizers are others than at fit start."""
        self._depth.clear()
        if [*map(id, trainer.optimizers)] != [*map(id, self._optimizers)]:
            raise MisconfigurationException(
                f"The Trainer's optimizers have been exchanged since the fit started: {type(self).__name__} acts in "
                "the steps of the earlier ones, and under others weights would train dense. Change learning rates and "
                "param groups of the same optimizers, or begin another fit."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note that the penalty counts for this micro-batch.

        Its gradient is known in closed form and joins the thresholds' in ``before_step``: the same as adding the
        penalty to ``loss``, without touching a tensor that its own backward may need.
        """
        self._backwards += 1
        self._prepared.clear()  # of a step that AMP skipped

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the micro-batches whose gradients are thrown away now."""
        self._backwards = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make the gradients, now whole and unscaled, those of the method; gradient clipping comes after."""
        if id(optimizer) not in self._group_sizes:
            optimizer = getattr(optimizer, "optimizer", optimizer)
        thawed = any(parameter.requires_grad for parameter in self._frozen.get(id(optimizer), ()))
        if thawed or _size(optimizer) != self._group_sizes.get(id(optimizer)):
            self._take_newcomers(optimizer)
        share = self._backwards / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        self._backwards = 0
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self.before_step(optimizer, share, 1.0 if scaler is None or unscales(optimizer) else scaler.get_scale())
        self._prepared.add(id(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log every so many steps, if asked for."""
        every, step = self.log_every_n_steps, trainer.global_step
        if every is not None and trainer.loggers and step // every > self._logged_step // every:
            self._logged_step = step
            pl_module.log_dict(self._scalars(self.layer_count), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and warn by name of layers that have no weight left."""
        counts = self.layer_count
        if trainer.loggers:
            pl_module.log_dict(self._scalars(counts), on_step=False, on_epoch=True, sync_dist=True)
        for name, count in counts.items():
            if count == 0:
                self._warn_once(f"{name} has no weight left: density 0 after epoch {trainer.current_epoch}.")
        self.report_trouble()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights behind, whatever the moment, so that a last checkpoint is whole."""
        self.leave_step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module and the optimizers; masks stay readable."""
        if stage == "fit":
            self._release()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue from a checkpoint that does not hold this method's state."""
        if trainer.state.fn != "fit" or self.state_key in checkpoint["callbacks"]:
            return
        states = checkpoint["callbacks"].items()
        others = [key for key, state in states if isinstance(state, dict) and "lightning_sparse" in state]
        raise MisconfigurationException(
            f"The checkpoint has no state of {self.state_key}: it was written "
            + (f"with {', '.join(others)}. " if others else "without a method of lightning_sparse. ")
            + _from_weights(self)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._restored = True
        self._begun = dict(state_dict.get("begun", {"epochs": 0, "steps": 0}))  # earlier versions wrote none

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer, the module and the optimizers."""
        state = {**self.__dict__, **_detached()}
        for attached in ("log", "log_dict"):  # the module's methods, which the Trainer gives its callbacks
            state.pop(attached, None)
        return state

    # ------------------------------------------------------------------ inside

    def _release(self) -> None:
        """Forget the module and the optimizers, if any."""
        for handle in self._handles:
            handle.remove()
        self.__dict__.update(_detached())

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Enter the step right before the update, which is after the closure (forward and backward) if there is one."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if self._depth[id(optimizer)] > 1:  # a step that calls that of its base class, which has the hooks, too
            return None
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._enter(optimizer)
            return None

        called = False

        def closure_then_enter() -> Any:
            nonlocal called
            if called:  # the weights of within the update, which are dense for methods with latent ones
                raise MisconfigurationException(
                    f"{type(self).__name__} cannot train with {type(optimizer).__name__}, which evaluates the loss "
                    "several times within a step. Use an optimizer that does it once, such as SGD or AdamW."
                )
            called = True
            result = closure()
            self._enter(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_enter}
        return (args[0], closure_then_enter, *args[2:]), kwargs

    def _enter(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._prepared:  # stepped directly, past Lightning's hooks
            self.before_step(optimizer, 1.0, 1.0)
        self.enter_step(optimizer)

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[id(optimizer)] -= 1
        if self._depth[id(optimizer)] > 0:
            return
        self._prepared.discard(id(optimizer))
        self.after_step(optimizer)

    def _remember(self, optimizer: Optimizer, choices: Sequence[ParameterChoice]) -> None:
        """Note what would change if weights joined the training of ``optimizer``."""
        owned = _owned(optimizer)
        frozen = [choice.parameter for choice in choices if choice.reason == FROZEN]
        self._frozen[id(optimizer)] = [parameter for parameter in frozen if id(parameter) in owned]
        self._group_sizes[id(optimizer)] = _size(optimizer)

    def _take_newcomers(self, optimizer: Optimizer) -> None:
        """Take over weights that were added to ``optimizer``, or unfrozen, since the fit started."""
        assert self._module is not None
        known = set(self._weights)
        owned = _owned(optimizer)
        choices = select_parameters(self._module, self.include, self.exclude)
        ours = [choice for choice in choices if choice.reason is None and id(choice.parameter) in owned]
        replaced = [c.name for c in ours if c.name in known and self._weights[c.name].parameter is not c.parameter]
        if replaced:
            raise MisconfigurationException(
                f"{', '.join(replaced)} became another parameter during the fit, which {type(self).__name__} would "
                "leave dense. Keep the layer and write new values into its weight, or begin another fit."
            )
        new = [choice for choice in ours if choice.name not in known]
        if new:
            assert self._trainer is not None
            self._refuse_overlap(new, self._trainer)
            self.attach_more(new, optimizer)
            rank_zero_info(table(f"{type(self).__name__} of lightning_sparse: new in training", new))
        self._remember(optimizer, choices)

    def _check(self, trainer: Trainer) -> None:
        method = type(self).__name__
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                f"{method} needs whole weights on every process; {type(trainer.strategy).__name__} may split them. "
                "Use a single device or strategy='ddp'."
            )
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{method} cannot train with LBFGS, which evaluates the loss several times within a step. "
                "Use a first-order optimizer such as SGD or AdamW."
            )
        sharded = any("ZeroRedundancyOptimizer" in map(_name, type(o).__mro__) for o in trainer.optimizers)
        if sharded or getattr(trainer.strategy, "_model_averaging_period", None) is not None:
            raise MisconfigurationException(
                f"{method} needs every process to make the same update: ZeroRedundancyOptimizer and model averaging "
                "(model_averaging_period) do not. Use plain DDP with a plain optimizer."
            )
        if trainer.ckpt_path and not self._restored and not trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"The checkpoint {trainer.ckpt_path} has no state of {self.state_key}. {_from_weights(self)}"
            )

    def _require_length(self, purpose: str, known: bool = True) -> None:
        """Raise if ``known`` is False, or the number of steps of the training is not; for a purpose, in words."""
        if not known or math.isinf(self.total_steps):
            raise MisconfigurationException(
                f"{type(self).__name__} must know how long the training is, {purpose}. Give the Trainer max_epochs or "
                "max_steps, and limit_train_batches if the data have no known length."
            )

    def _warn_of_other_weights(self) -> None:
        rank_zero_warn(
            f"This {type(self).__name__} holds the state of an earlier fit of other weights: it starts afresh."
        )

    def _mark_unowned(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer]) -> None:
        """Mark the weights that no optimizer owns; raise if nothing is left to make sparse."""
        method = type(self).__name__
        selected = [choice for choice in choices if choice.reason is None]
        if not selected:
            raise MisconfigurationException(
                f"{method} found nothing to make sparse.\n{table('The parameters are:', choices)}\n"
                "Name weights with include=[...], or take the callback away to train dense."
            )
        owners: dict[int, int] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        for choice in selected:
            count = owners.get(id(choice.parameter), 0)
            if count == 0:
                choice.reason = "in no optimizer"
            elif count > 1:
                raise MisconfigurationException(
                    f"{choice.name} is in {count} optimizers or param groups; {method} needs it in one. "
                    "Leave it to one of them, or keep it dense with exclude."
                )
        if all(choice.reason for choice in selected):
            raise MisconfigurationException(
                f"{method} would train nothing sparse: no optimizer owns any of the chosen weights "
                f"({', '.join(choice.name for choice in selected)}). Return them from configure_optimizers."
            )

    def _warn_of_averages(self, trainer: Trainer) -> None:
        """Warn that an average of weights over time is denser than each of them."""
        for name in averaging(trainer) if self.moves else ():
            rank_zero_warn(
                f"{name} averages weights of several steps: what was nonzero at one of them is so in the average, "
                f"which is denser than {type(self).__name__} says unless it begins when connections move no longer. "
                "For exact zeros multiply each weight of the averaged module by callback.masks[name] after the fit."
            )

    def _refuse_overlap(self, choices: Sequence[ParameterChoice], trainer: Trainer) -> None:
        """Raise if another method of this Trainer already has one of the weights."""
        mine = {choice.name for choice in choices if choice.reason is None}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SparseCallback) and other is not self and other._trainer is trainer:
                both = sorted(mine & set(other._weights))
                if both:
                    raise MisconfigurationException(
                        f"{type(other).__name__} and {type(self).__name__} both claim {both}. "
                        "Divide the weights with include and exclude."
                    )

    def _refuse_storage(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise unless all the weights are stored as this method trains them."""
        for choice in choices:
            if choice.reason is None and (choice.sparse is not None) != (self.storage == "sparse"):
                raise MisconfigurationException(
                    f"{choice.name} is {'' if choice.sparse is not None else 'not '}held by a sparse layer, but "
                    f"{type(self).__name__} trains with storage={self.storage!r}. Leave it out with exclude, or make "
                    "sparse layers dense with lightning_sparse.storage.to_dense(module)."
                )

    @property
    def _size(self) -> int:
        """Number of all selected weights."""
        if not self._weights:
            raise RuntimeError(f"{type(self).__name__} has no weights yet: they are chosen when trainer.fit starts.")
        return sum(weight.size for weight in self._weights.values())

    def _scalars(self, counts: Mapping[str, int]) -> dict[str, float]:
        sparsity = {f"sparsity/{name}": 1 - count / self._weights[name].size for name, count in counts.items()}
        if self._all[0] is self:  # Lightning would log the mean of what several methods call by one name
            active = sum(counts.values()) + sum(sum(other.layer_count.values()) for other in self._all[1:])
            sparsity["sparsity/model"] = 1 - active / sum(method._size for method in self._all)
        return {**sparsity, **self.watched}

    @property
    def _all(self) -> list["SparseCallback"]:
        """The methods of the Trainer that have weights: this one, and those beside it."""
        assert self._trainer is not None
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, SparseCallback) and callback._weights]

    def _warn_once(self, message: str) -> None:
        key = message.split(":")[0]
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)


def _detached() -> dict[str, Any]:
    """Return the attributes of a callback that no fit is using."""
    return {
        "_handles": [],
        "_optimizers": [],
        "_prepared": set(),
        "_depth": {},
        "_group_sizes": {},
        "_frozen": {},
        "_backwards": 0,
        "_logged_step": 0,
        "_warned": set(),
        "_module": None,
        "_trainer": None,
    }


def averaging(trainer: Trainer) -> list[str]:
    """Return the names of the callbacks that average weights over time."""
    kinds = {"StochasticWeightAveraging", "WeightAveraging"}
    types = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [kind.__name__ for kind in types if kinds & {base.__name__ for base in kind.__mro__}]


def unscales(optimizer: Optimizer | None) -> bool:
    """Tell whether a gradient scaler, if any, divides the gradients itself; otherwise a fused optimizer does."""
    return not getattr(optimizer, "_step_supports_amp_scaling", False)


def refuse_other_weights(
    callback: SparseCallback, here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]
) -> None:
    """Raise unless the loaded state has just the chosen weights: names and shapes."""
    if here != there:
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise MisconfigurationException(
            f"The checkpoint's state of {type(callback).__name__} and this module differ in {differing}: "
            "choose the same weights (include, exclude, requires_grad, optimizers) as when it was written."
        )


def refuse_other_sparsity(callback: SparseCallback, there: float, here: float) -> None:
    """Raise unless the loaded state has the sparsity that the callback was made with."""
    if here != there:
        raise MisconfigurationException(
            f"The checkpoint was written with sparsity={there!r}, this {type(callback).__name__} has {here!r}: "
            "give it the same."
        )


def _from_weights(callback: object) -> str:
    return (
        "To start from its weights with fresh state: model = MyModule.load_from_checkpoint(path), then "
        f"trainer.fit(model) without ckpt_path. To continue, give the Trainer the callback it was written with, "
        f"not this {type(callback).__name__}."
    )


def _name(kind: type) -> str:
    return kind.__name__


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _owned(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _epochs(trainer: Trainer) -> int | None:
    """Return the number of epochs of the whole fit, None if nothing bounds it."""
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs)
    if trainer.max_steps >= 0 and trainer.num_training_batches != float("inf"):
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        bounds.append(math.ceil(trainer.max_steps / max(steps, 1)))
    return max(1, min(bounds)) if bounds else None
