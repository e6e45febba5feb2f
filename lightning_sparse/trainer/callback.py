"""SparseCallback: Lightning's hooks become a method's verbs."""

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks, lightning_private
from lightning_sparse.compat.lightning import Callback, LightningModule, Trainer, rank_zero_info
from lightning_sparse.compat.options import Options, option
from lightning_sparse.layers.selection import ParameterChoice, select_parameters, table
from lightning_sparse.rules.parts import WHOLE, together
from lightning_sparse.trainer import agreement, divided_states, guards, shards
from lightning_sparse.trainer.averages import mask_averages, take_writes_between
from lightning_sparse.trainer.fit import Fit, epochs, steps
from lightning_sparse.trainer.joining import take_added
from lightning_sparse.trainer.ownership import Ownership
from lightning_sparse.trainer.readouts import Readouts
from lightning_sparse.trainer.updates import UpdateHooks, unscales
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["SparseCallback"]


class SparseCallback(Options, Readouts, Verbs, Callback, ABC):
    """Base of every sparse-training method: it calls the verbs (:class:`~lightning_sparse.trainer.verbs.Verbs`)."""

    include: Sequence[str] | None = option(
        default=None,
        doc='glob patterns on parameter names such as ``["encoder.*"]``; only weights that match are made sparse, '
        "whatever their layer. Default: the weights of linear, convolution, recurrent and attention layers, and of "
        "those that ``register_layer`` has made known.",
    )
    exclude: Sequence[str] = option(
        default=(), doc='glob patterns on the names of weights that stay dense, such as ``["*.head.weight"]``.'
    )
    log_every_n_steps: int | None = option(
        default=None,
        check=partial(checks.integer, 1, "Leave it out to log once an epoch."),
        doc="log also every so many optimizer steps; by default at the end of each epoch alone. The Trainer writes "
        "step values at every ``Trainer(log_every_n_steps)``-th step only: give that number, or a multiple of it, "
        "between which the Trainer repeats the latest values.",
    )
    log_layers: bool = option(
        default=True,
        check=checks.flag,
        doc="log ``sparsity/<name>`` of each weight, too; False: only the sparsities of all weights together.",
    )

    #: names of arguments without which the state of a checkpoint means something else
    must_stay: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """Make the state of a callback that no fit is using."""
        super().__post_init__()
        self.include = checks.patterns(include=self.include)
        self.exclude = checks.patterns(exclude=self.exclude) or []
        self._weights: Mapping[str, Any] = {}
        self._restored = False
        self._before_fit = {"epochs": 0, "steps": 0}  # of the Trainer
        self.run_seed = 0
        self._release()

    def choices_in(self, module: nn.Module) -> list[ParameterChoice]:
        """Return all parameters of ``module``, and of each whether it is made sparse, or why not."""
        return select_parameters(module, self.include, self.exclude)

    # ------------------------------------------------------------------ a fit begins and ends

    @property
    def state_key(self) -> str:
        """Identify the state in a checkpoint by method and choice of layers."""
        return lightning_private.state_key(self, include=self.include, exclude=self.exclude)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, which an exception may have ended."""
        self._release()
        if stage == "fit":
            self._restored = False
            # those of a checkpoint, if one is loaded now
            self._before_fit = {"epochs": trainer.current_epoch, "steps": trainer.global_step}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the weights, take them over, and show which they are."""
        agreement.refuse_other_ranks(self)
        guards.refuse_trainer(self, trainer)
        guards.refuse_unread_checkpoint(self, trainer, self._restored)
        self.refuse_trainer(trainer)
        choices = self.choices_in(pl_module)
        guards.refuse_unowned(self, choices, trainer.optimizers)
        guards.refuse_overlap(self, choices, trainer)
        if self.include is None and not self.exclude:
            guards.warn_of_few(self, choices)
        selected = [choice for choice in choices if choice.reason is None]
        guards.refuse_pruned(self, selected, pl_module)
        shards.refuse_parts(self, selected, trainer)
        self.refuse_choices(selected)
        guards.warn_of_averages(self, trainer)
        self.run_seed = trainer.strategy.broadcast(torch.initial_seed())
        self._fit.restored_late = trainer.strategy.restore_checkpoint_after_setup
        self._fit.identical_parts = shards.identical_parts(selected)
        self.attach(selected, trainer.optimizers, self._restored)
        self._restored = False
        for optimizer in trainer.optimizers:
            self._fit.handles += self._update_hooks.register(optimizer)
        self._update_hooks.awake = not self._fit.restored_late
        self._fit.optimizers = [*trainer.optimizers]
        self._ownership = Ownership(trainer.optimizers, choices)
        self._fit.module, self._fit.trainer = pl_module, trainer
        self._fit.module_size = sum(choice.size for choice in choices)
        guards.warn_of_log_interval(self, self.log_every_n_steps, trainer)
        rank_zero_info(table(f"{self!r} of lightning_sparse", choices, self.planned_density))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights behind, whatever the moment, so that a last checkpoint is whole.

        If a consolidated checkpoint could not be read, say what helps.
        """
        self.abort_update()
        unread = "optimizer_states" in str(exception) or self.state_key in str(exception)
        if unread and divided_states.is_consolidated(str(trainer.ckpt_path)):
            guards.refuse_consolidated(self, trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module and the optimizers; masks stay readable."""
        self._release()

    def _release(self) -> None:
        """Forget the module and the optimizers, if any."""
        if "_fit" in vars(self):
            self._fit.release()
        self._fit, self._update_hooks, self._ownership = Fit(), UpdateHooks(self), Ownership()

    # ------------------------------------------------------------------ epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch that a resumed run may be in the middle of; with uneven batches, all by one schedule."""
        own = steps(trainer, self._before_fit)
        self._fit.first_steps = {own: trainer.strategy.broadcast(own)}
        self._fit.logged_step = trainer.global_step
        if not self._restored:
            shards.warn_of_identical_parts(self, self._fit.identical_parts)
        self.begin_epoch(trainer.current_epoch, epochs(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Anneal and redistribute; keep an average sparse that takes the network's place in an epoch of its own."""
        self._fit.looks.soon()
        mask_averages(self, trainer, pl_module)
        self.begin_epoch(trainer.current_epoch, epochs(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep averages sparse, one of which may be about to be validated, and the network."""
        take_writes_between(self)
        mask_averages(self, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look out for what other code writes after a validation."""
        self._fit.looks.soon()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep an average sparse that takes the network's place, and the network."""
        take_writes_between(self)
        mask_averages(self, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and warn by name of layers that have no weight left, or are not finite."""
        counts = self.layer_count
        if trainer.loggers:
            pl_module.log_dict(self.metrics(counts), on_step=False, on_epoch=True, sync_dist=True)
        diverged = [name for name, weight in self._weights.items() if weight.diverged]
        guards.warn_of_divergence(self, diverged, trainer.current_epoch)
        for name, count in counts.items():
            if count == 0 and name not in diverged:
                self.warn_once(f"{name} has no weight left: density 0 after epoch {trainer.current_epoch}.")
        self.warn_at_epoch_end()

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on with what other code wrote between batches; raise if the optimizers are others than at fit start."""
        self._update_hooks.awake = True
        self._update_hooks.forget_broken_off()
        guards.refuse_exchanged_optimizers(self, trainer)
        if self._fit.looks.fresh:
            take_writes_between(self)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note that the penalty counts for this micro-batch.

        Its gradient is known in closed form and joins the thresholds' in ``before_step``: the same as adding the
        penalty to ``loss``, without touching a tensor that its own backward may need.
        """
        self._fit.backwards += 1
        self._update_hooks.forget_prepared()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the micro-batches whose gradients are thrown away now."""
        self._fit.backwards = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make the gradients, now whole and unscaled, those of the method; gradient clipping comes after."""
        if not self._ownership.knows(optimizer):
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if self._ownership.has_grown(optimizer):
            take_added(self, optimizer, self._ownership)
        share = self._fit.backwards / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        self._fit.backwards = 0
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self._update_hooks.prepare(
            optimizer, share, 1.0 if scaler is None or unscales(optimizer) else scaler.get_scale()
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make sure that the update was seen; log every so many steps, if asked for."""
        guards.refuse_unseen_update(self, self._update_hooks.unseen, trainer)
        self._update_hooks.awake = not self._fit.restored_late
        every, step = self.log_every_n_steps, trainer.global_step
        if every is not None and trainer.loggers and step // every > self._fit.logged_step // every:
            self._fit.logged_step = step
            pl_module.log_dict(self.metrics(self.layer_count), on_step=True, on_epoch=False)

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep averages sparse, one of which may be about to be saved, or in the checkpoint already.

        Where processes hold parts of weights, have the state saved by shards, or whole, as the module's is.
        """
        mask_averages(self, trainer)
        if together([*self._weights.values()]) is not WHOLE:
            divided_states.save(trainer, checkpoint, self.state_key)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and plain values only."""
        return {
            "lightning_sparse": type(self).__name__,
            "method": repr(self),
            "arguments": agreement.written_arguments(self.arguments),
        }

    def divided_state(self, trainer: Trainer) -> dict[str, Any]:
        """Return a state with all DTensors that one in a checkpoint may have, divided as they are to be."""
        return self.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue from a checkpoint that does not hold this method's state; read what is in shards."""
        states, key = checkpoint.get("callbacks", {}), self.state_key
        if key in states and self._fit.restored_late:
            states[key] = divided_states.read(states[key], self.divided_state(trainer), key, str(trainer.ckpt_path))
        if trainer.state.fn == "fit":
            guards.refuse_missing_state(self, key, states)
            states[key] = agreement.saved(self, states[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        agreement.compare_arguments(self, state_dict.get("arguments"), self.must_stay)
        self._restored = True
        self._before_fit = dict(state_dict.get("begun", {"epochs": 0, "steps": 0}))  # earlier versions wrote none

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module's methods ``log`` and ``log_dict``, which the Trainer gives callbacks."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
