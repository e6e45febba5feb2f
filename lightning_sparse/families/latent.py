"""LatentCallback: methods whose layers compute with ``P = f(W)`` while dense latent weights ``W`` are trained.

Between optimizer steps the module's parameter holds ``P``, so every forward, backward, checkpoint and other callback
sees plain sparse weights. For the optimizer's update alone the parameter is given ``W`` (its storage is exchanged, no
copy), with ``dW`` in its gradient.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.shards import local
from lightning_sparse.families.latent_guards import refuse_other_outputs, refuse_other_steps, refuse_sparse_layers
from lightning_sparse.families.latent_readouts import LatentReadouts
from lightning_sparse.families.target import Target
from lightning_sparse.families.thresholds import Thresholds
from lightning_sparse.kernels.dispatch import is_fused
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import select
from lightning_sparse.rules.parts import WHOLE, part_of, together
from lightning_sparse.rules.select import zero_outside_
from lightning_sparse.trainer.adopt import adopt
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.guards import refuse_capture, refuse_other_sparsity, refuse_other_weights
from lightning_sparse.trainer.ownership import Ownership
from lightning_sparse.trainer.shards import refuse_parts_of_rows
from lightning_sparse.weights.joined import Joined, can_join
from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.latent_group import LatentGroup

__all__ = ["LatentCallback", "LatentGroup", "LatentWeight"]


class LatentCallback(LatentReadouts, SparseCallback):
    """Base of the methods with latent weights.

    A method defines ``effective`` (the forward function) and ``gradients`` (its derivative). If it trains thresholds,
    it is a :class:`~lightning_sparse.families.thresholds.Thresholded` as well.
    """

    #: names of boolean tensors in each weight's state, all True at first, kept as bits
    mask_names: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Let what is written for matrices have matrices."""
        super().__init_subclass__(**options)
        if {"effective", "gradients"} & vars(cls).keys() and "joins" not in vars(cls):
            cls.joins = False

    def __post_init__(self) -> None:
        """Begin without weights."""
        super().__post_init__()
        self._weights: dict[str, LatentWeight] = {}
        self._groups: dict[int, LatentGroup] = defaultdict(LatentGroup)  # by optimizer
        self._thresholds: Thresholds | None = None

    @property
    def _target(self) -> Target | None:
        """What the thresholds are shifted to meet, if anything."""
        return self._thresholds.target if self._thresholds else None

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``P = f(W)`` into ``out``.

        Args:
            weight: the weight; ``weight.thresholds.tau``, if it has any, is of shape ``(out, 1)`` or ``(out, n)``.
            W: its latent weights ``(out, n)``.
            out: ``(out, n)``.

        Returns:
            How many weights pass, if the method has a collapse guard.
        """

    @abstractmethod
    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """Replace ``dP``, the gradient of ``P``, by ``dW``; that of ``tau`` goes to ``weight.thresholds.dtau["t"]``."""

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """Return further tensors of a weight's state, of its shape."""
        return {}

    def latent(self, weight: LatentWeight, P: Tensor) -> Tensor:
        """Return the ``W`` that ``P`` would be made of where it is not 0, both of the parameter's shape.

        It is asked of what other code has written, after ``effective`` has been called.
        """
        return P

    def written(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """See latent weights that other code has written where ``P`` was 0, before ``P`` is made."""

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """See the latent weights after an update of ``optimizer``, before ``P`` is made; None: it was broken off."""

    def nonzero(self, weight: LatentWeight) -> Tensor:  # noqa: D102  (inherited)
        return _effective(self, weight) != 0 if weight.frozen is None else weight.frozen

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return latents, thresholds and buffers: tensors and plain values only."""
        self._take_writes_between(by_value=True)
        return {
            **super().state_dict(),
            **({"target": self._target.state(), "begun": dict(self._before_fit)} if self._target else {}),
            **(self._thresholds.states.state_dict(self._weights) if self._thresholds else {}),
            "granularity": "layer" if self._thresholds is None else self._thresholds.method.granularity,
            "weights": {name: weight.state() for name, weight in self._weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; into the weights in use if fit has begun."""
        if self._thresholds:
            self._thresholds.refuse_other_granularity(state_dict["granularity"])
        there = state_dict.get("target", {}).get("sparsity")
        refuse_other_sparsity(self, there, self._target.sparsity if self._target else None)
        if self._target:
            self._target.load(state_dict["target"])
        if self._thresholds:
            self._thresholds.states.take(state_dict.get("optimizer", {}))
        states = state_dict["weights"]
        if self._fit.module is not None:
            here = {name: weight.shape for name, weight in self._weights.items()}
            refuse_other_weights(self, here, {name: tuple(state["latent"].shape) for name, state in states.items()})
            states = {name: weight.here(states[name]) for name, weight in self._weights.items()}
        loaded = {name: LatentWeight.loaded(name, state, self.mask_names) for name, state in states.items()}
        if self._fit.module is None:
            self._weights = loaded
        else:
            for name, weight in self._weights.items():
                weight.copy_(loaded[name])
            self._project(*self._weights.values())
        super().load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make room for what the checkpoint has by shards of the optimizers' states of thresholds."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self._thresholds and self._thresholds.states.apart and state:
            self._thresholds.states.expect(state.get("optimizer", {}), self._weights)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            if self._target:
                self._target.release()
            if self._thresholds:
                self._thresholds.release(self._weights)
            for group in self._groups.values():
                group.joined, group.buffers = [], []
            for weight in self._weights.values():
                weight.release()

    # ------------------------------------------------------------------ a fit begins

    def refuse_trainer(self, trainer: Trainer) -> None:  # noqa: D102  (inherited)
        refuse_other_steps(self, trainer)

    @property
    def needs_whole_weights(self) -> str | None:
        """None: latent weights are kept of the rows that are here."""
        return None

    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:  # noqa: D102  (inherited)
        refuse_parts_of_rows(self, choices)
        refuse_sparse_layers(self, choices)

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        held = {name: tuple(weight.latent.shape) for name, weight in self._weights.items()}
        adoption = adopt(self, choices, held, resumed, lambda: _continues(self, choices))
        if adoption == "fresh":
            self._weights = {choice.name: self._new(choice) for choice in choices}
        else:
            self._weights = {choice.name: self._weights[choice.name] for choice in choices}
            for choice in choices:
                refuse_other_outputs(self, self._weights[choice.name], choice)
                self._weights[choice.name].nonempty = choice.nonempty
                self._weights[choice.name].move_to(choice.parameter, choice.outputs)
            self._project(*self._weights.values())
        if self._thresholds:
            self._thresholds.states.begin(together([*self._weights.values()]) is not WHOLE, adoption == "resumed")
        if self._thresholds and adoption != "resumed":
            self._thresholds.forget_places(self._weights.values())
        self._groups.clear()
        for optimizer in optimizers:
            self._join(optimizer, list(self._weights.values()))
        if self._target:
            self._target.begin(self._groups, resumed=adoption == "resumed")

    @torch.no_grad()
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        refuse_parts_of_rows(self, choices)
        added = {choice.name: self._new(choice) for choice in choices}
        self._weights.update(added)
        self._join(optimizer, list(added.values()))
        if self._target:
            self._target.join(optimizer, list(added.values()))
            for weight in added.values():
                self._project(weight)

    def _new(self, choice: ParameterChoice) -> LatentWeight:
        """Return a weight that begins with the parameter's values."""
        latent = local(choice.parameter.detach()).clone()
        weight = LatentWeight(
            choice.name,
            latent,
            self.new_buffers(latent),
            outputs=choice.outputs,
            nonempty=choice.nonempty,
            part=part_of(choice.parameter),
        )
        for key in self.mask_names:
            weight.keep_mask(key, torch.tensor(True))
        if self._thresholds:
            self._thresholds.begin(weight)
        weight.parameter = choice.parameter
        self._project(weight)
        return weight

    def _join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Note which of the weights ``optimizer`` updates, and let it update their thresholds as well."""
        of = {id(weight.parameter): weight for weight in weights}
        ours = self._groups[id(optimizer)]
        members = [of[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in of]
        ours.weights += members
        if self._thresholds and not self._join_late:
            self._thresholds.join(optimizer, weights)
        if self._thresholds:
            ours.weights, ours.buffers = self._thresholds.lay_out(optimizer, ours.weights)
            ours.joined = self._thresholds.joined(optimizer, ours.weights)
            for joined in ours.joined:  # P to the last bit as it will be made from now on
                self._thresholds.set_levels(cast(LatentWeight, joined))
                joined.write(partial(self.effective, cast(LatentWeight, joined)))
                for weight in joined.weights:
                    self._fit.traces.note(_parameter(weight))
        elif self.joins:
            ours.joined = _joined(ours.weights)

    @property
    def _join_late(self) -> bool:
        """The thresholds are to join the optimizers once the states of these have been restored."""
        return self._thresholds is not None and self._thresholds.states.apart and self._fit.module is None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let thresholds join late, if they do; make sure that a plan, if there is one, can be followed."""
        super().on_train_start(trainer, pl_module)
        if self._thresholds and self._thresholds.states.apart:
            for optimizer in trainer.optimizers:
                self._thresholds.join(optimizer, self._groups[id(optimizer)].weights)
            self._ownership = Ownership(trainer.optimizers, self.choices_in(pl_module))
        if self._target:
            self._target.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a training that ended before its plan."""
        super().on_train_end(trainer, pl_module)
        if self._target:
            self._target.warn()

    # ------------------------------------------------------------------ steps

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: D102
        pass

    def take_writes(self, by_value: bool, optimizer: Optimizer | None = None) -> None:
        """Make ``W`` what ``P`` would be made of, where other code has written; a 0 written over a 0 says nothing."""
        differs = self._fit.traces.differs
        for each in self._fit.optimizers if optimizer is None else [optimizer]:
            weights = self._groups[id(each)].weights
            looked_at = [weight for weight in weights if by_value or differs(_parameter(weight))]
            if looked_at:
                self._take(each, looked_at)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Take what other code has written into some weights of ``optimizer``, if it has."""
        changed, added = [], []
        for weight in weights:
            found = self._changed(weight) if weight.effective is None else None
            if found is not None:
                changed.append(weight)
                added += [weight] if self._take_over(weight, *found) else []
        if added:
            self.written(optimizer, added)
        self._project(*changed)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        refuse_capture(self)
        if share:
            self.take_writes(self._fit.looks.due(), optimizer)
        group = self._groups[id(optimizer)]
        for weight in group.weights if not share else ():
            _parameter(weight).grad = None
        if self._target and share:
            self._target.calm(optimizer)
        stepping = group.parts([weight for weight in group.weights if weight.has_gradient])
        for part in stepping:
            weight = cast(LatentWeight, part)
            if self._thresholds and group.joined:  # P may have been written one by one, or of all at once
                self._thresholds.set_levels(weight)
            part.turn_gradient(partial(self.gradients if part.frozen is None else _keep_mask, weight))
        if self._thresholds:
            self._thresholds.complete_gradients(optimizer, group.weights, stepping, share, scale)

    @torch.no_grad()
    def before_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        if self._thresholds:
            self._thresholds.before_update(optimizer)
        for weight in self._groups[id(optimizer)].weights:
            weight.enter()

    @torch.no_grad()
    def after_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        if self._thresholds:
            self._thresholds.gather(optimizer)
        group = self._groups[id(optimizer)]
        weights = [weight for weight in group.weights if weight.leave()]
        self.updated(optimizer, weights)
        if self._target and self._target.follow(optimizer):
            weights = group.weights  # also those without a gradient
        parts = group.parts(weights)
        for joined in [part for part in parts if isinstance(part, Joined)]:
            self._project_all(joined)
        self._project(*(part for part in parts if not isinstance(part, Joined)))

    @torch.no_grad()
    def abort_update(self) -> None:  # noqa: D102
        weights = [weight for weight in self._weights.values() if weight.leave()]
        self.updated(None, weights)
        for weight in self._weights.values():  # also those that were left, but not brought back
            if weight.parameter is not None:
                self._write(weight, weight.values)  # no collapse guard: others may not be here to be asked
                self._fit.traces.note(_parameter(weight))

    def _changed(self, weight: LatentWeight) -> tuple[Tensor, Tensor] | None:
        """Return the ``P`` of a weight's ``W``, and where its parameter is another, a boolean tensor; None: nowhere."""
        X, P = weight.values, _effective(self, weight)
        same = torch.equal(X, P)
        where = torch.zeros_like(X, dtype=torch.bool) if same else (X != P).logical_and_(~(X.isnan() & P.isnan()))
        if not weight.part.any(0 if same else select.count(where)):
            self._fit.traces.note(_parameter(weight))
            return None
        if not self._fit.traces.differs(_parameter(weight)):  # through .data, as may be done at every step
            self._fit.looks.always()
        return P, where

    def _take_over(self, weight: LatentWeight, P: Tensor, where: Tensor) -> bool:
        """Take what was written over ``P`` ``where``; tell whether there are values where there was 0."""
        X = weight.values
        added = where & (P == 0) & (X != 0)
        weight.latent.copy_(torch.where(where, self.latent(weight, X), weight.latent))
        self._fit.tell_once(f"{self!r} goes on with what other code wrote into {weight.name}.")
        lost = 0 if weight.frozen is None else weight.part.total(select.count(torch.gt(added, weight.frozen)))[0]
        if lost:
            self.warn_once(
                f"{self!r} has set {lost} values to 0 that other code wrote into {weight.name} outside of its mask, "
                "which stays since sparsity was reached: load weights before the fit, or before that."
            )
        return weight.part.any(select.count(added))

    def _project(self, *weights: LatentWeight) -> None:
        """Write ``P`` into the parameters of some weights, after the collapse guard."""
        passing = [self._write(weight, weight.values) for weight in weights]
        for weight in self._thresholds.reset_collapsed(weights, passing) if self._thresholds else ():
            self._write(weight, weight.values)
        for weight in weights:
            self._fit.traces.note(_parameter(weight))

    def _project_all(self, joined: Joined) -> None:
        """Write ``P`` into the parameters of weights that lie together, after the collapse guard."""
        joined.write(partial(self._make_all, joined))
        for weight in joined.weights:
            self._fit.traces.note(_parameter(weight))

    def _make_all(self, joined: Joined, W: Tensor, out: Tensor) -> None:
        weight = cast(LatentWeight, joined)
        if self._thresholds:
            self._thresholds.set_levels(weight)
        passing = self.effective(weight, W, out)
        if self._thresholds and self._thresholds.reset_all_collapsed(joined, passing):
            self._thresholds.set_levels(weight)
            self.effective(weight, W, out)

    def _write(self, weight: LatentWeight, P: Tensor) -> int | Tensor | None:
        """Write ``P``; return how many weights pass, if the method counts them."""
        if weight.frozen is not None:
            return weight.write(P, partial(_masked, weight))
        if self._thresholds:
            self._thresholds.set_levels(weight)
        return weight.write(P, partial(self.effective, weight))


def _parameter(weight: LatentWeight) -> nn.Parameter:
    assert weight.parameter is not None
    return weight.parameter


def _joined(weights: Sequence[LatentWeight]) -> list[Joined]:
    """Lay weights end to end, those of a device and dtype, where that saves launches."""
    alike: dict[Any, list[LatentWeight]] = {}
    for weight in weights:
        if is_fused(weight.latent.device) and can_join(weight):
            alike.setdefault((weight.latent.device, weight.latent.dtype), []).append(weight)
    return [Joined(members, None, None) for members in alike.values()]


def _masked(weight: LatentWeight, W: Tensor, out: Tensor) -> None:
    """Write ``W * M``, M being the mask that stays."""
    assert weight.frozen is not None
    zero_outside_(out.copy_(W), weight.matrix(weight.frozen, "M"))


def _keep_mask(weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
    """Replace ``dP`` by ``dP * M``, M being the mask that stays."""
    assert weight.frozen is not None
    zero_outside_(dP, weight.matrix(weight.frozen, "M"))


@torch.no_grad()
def _effective(method: LatentCallback, weight: LatentWeight) -> Tensor:
    """Return ``P``, computed from the state."""
    P = torch.empty_like(weight.latent)
    method._write(weight, P)
    return P


def _continues(method: LatentCallback, choices: Sequence[ParameterChoice]) -> bool:
    """Tell whether the parameters hold just what the state of an earlier fit says."""
    held = [method._weights[choice.name] for choice in choices]
    if any(part_of(choice.parameter) != weight.part for choice, weight in zip(choices, held, strict=True)):
        return False
    here = [local(choice.parameter).cpu() for choice in choices]
    same = all(torch.equal(x, _effective(method, weight).cpu()) for x, weight in zip(here, held, strict=True))
    return together(held).all(same)
