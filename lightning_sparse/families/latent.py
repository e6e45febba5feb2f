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
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.shards import local
from lightning_sparse.families.foreign_writes import ForeignWrites
from lightning_sparse.families.latent_guards import refuse_other_outputs, refuse_other_steps, refuse_sparse_layers
from lightning_sparse.families.latent_readouts import LatentReadouts
from lightning_sparse.families.projection import Projection, keep_mask, parameter
from lightning_sparse.families.thresholds import Thresholds
from lightning_sparse.kernels.dispatch import is_fused
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.parts import part_of, together
from lightning_sparse.trainer.adopt import adopt
from lightning_sparse.trainer.averages import take_writes_between
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.guards import refuse_capture, refuse_other_weights
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
        self._trained: Thresholds | None = None  # see Thresholded
        self._projection = Projection(self)
        self._foreign_writes = ForeignWrites(self, self._projection)

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
        return self._projection.made(weight) != 0 if weight.frozen is None else weight.frozen

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return latents, with their thresholds, and buffers: tensors and plain values only."""
        take_writes_between(self)
        return {
            **super().state_dict(),
            "granularity": "layer",
            "weights": {name: weight.state() for name, weight in self._weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; into the weights in use if fit has begun."""
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
            self._projection.project([*self._weights.values()])
        super().load_state_dict(state_dict)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
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
            self._projection.project([*self._weights.values()])
        if self._trained:
            self._trained.begin_fit([*self._weights.values()], adoption == "resumed")
        self._groups.clear()
        for optimizer in optimizers:
            self._join(optimizer, list(self._weights.values()))
        if self._trained and self._trained.target:
            self._trained.target.begin(self._groups, resumed=adoption == "resumed")

    @torch.no_grad()
    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        refuse_parts_of_rows(self, choices)
        added = {choice.name: self._new(choice) for choice in choices}
        self._weights.update(added)
        self._join(optimizer, list(added.values()))
        if self._trained and self._trained.target:
            self._trained.target.join(optimizer, list(added.values()))
            self._projection.project([*added.values()])

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
        if self._trained:
            self._trained.begin(weight)
        weight.parameter = choice.parameter
        self._projection.project([weight])
        return weight

    def _join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Note which of the weights ``optimizer`` updates, and let it update their thresholds as well."""
        group = self._groups[id(optimizer)]
        group.join(optimizer, weights)
        if self._trained:
            if self._fit.module is not None or not self._trained.states.apart:  # else once states are restored
                self._trained.join(optimizer, weights)
            self._trained.lay_out(optimizer, group)
            for joined in group.joined:  # P to the last bit as it will be made from now on
                self._projection.write_all(joined)
        elif self.joins:
            group.joined = _joined(group.weights)

    # ------------------------------------------------------------------ steps

    def take_writes(self, by_value: bool, optimizer: Optimizer | None = None) -> None:
        """Make ``W`` what ``P`` would be made of, where other code has written; a 0 written over a 0 says nothing."""
        differs = self._fit.traces.differs
        for each in self._fit.optimizers if optimizer is None else [optimizer]:
            weights = self._groups[id(each)].weights
            looked_at = [weight for weight in weights if by_value or differs(parameter(weight))]
            if looked_at:
                self._foreign_writes.take(each, looked_at)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        refuse_capture(self)
        if share:
            self.take_writes(self._fit.looks.due(), optimizer)
        group = self._groups[id(optimizer)]
        for weight in group.weights if not share else ():
            parameter(weight).grad = None
        thresholds = self._trained
        if thresholds and thresholds.target and share:
            thresholds.target.calm(optimizer)
        stepping = group.parts([weight for weight in group.weights if weight.has_gradient])
        for part in stepping:
            weight = cast(LatentWeight, part)
            if thresholds and group.joined:  # P may have been written one by one, or of all at once
                thresholds.set_levels(weight)
            part.turn_gradient(partial(self.gradients if part.frozen is None else keep_mask, weight))
        if thresholds:
            thresholds.complete_gradients(optimizer, group.weights, stepping, share, scale)

    @torch.no_grad()
    def before_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        if self._trained:
            self._trained.before_update(optimizer)
        for weight in self._groups[id(optimizer)].weights:
            weight.enter()

    @torch.no_grad()
    def after_update(self, optimizer: Optimizer) -> None:  # noqa: D102
        thresholds, group = self._trained, self._groups[id(optimizer)]
        if thresholds:
            thresholds.gather(optimizer)
        weights = [weight for weight in group.weights if weight.leave()]
        self.updated(optimizer, weights)
        if thresholds and thresholds.target and thresholds.target.follow(optimizer):
            weights = group.weights  # also those without a gradient
        self._projection.project(group.parts(weights))

    @torch.no_grad()
    def abort_update(self) -> None:  # noqa: D102
        weights = [weight for weight in self._weights.values() if weight.leave()]
        self.updated(None, weights)
        for weight in self._weights.values():  # also those that were left, but not brought back
            if weight.parameter is not None:
                self._projection.write(weight, weight.values)  # no collapse guard: others may not be here to be asked
                self._fit.traces.note(parameter(weight))


def _joined(weights: Sequence[LatentWeight]) -> list[Joined]:
    """Lay weights end to end, those of a device and dtype, where that saves launches."""
    alike: dict[Any, list[LatentWeight]] = {}
    for weight in weights:
        if is_fused(weight.latent.device) and can_join(weight):
            alike.setdefault((weight.latent.device, weight.latent.dtype), []).append(weight)
    return [Joined(members, None, None) for members in alike.values()]


def _continues(method: LatentCallback, choices: Sequence[ParameterChoice]) -> bool:
    """Tell whether the parameters hold just what the state of an earlier fit says."""
    held = [method._weights[choice.name] for choice in choices]
    if any(part_of(choice.parameter) != weight.part for choice, weight in zip(choices, held, strict=True)):
        return False
    here = [local(choice.parameter).cpu() for choice in choices]
    same = all(torch.equal(x, method._projection.made(weight).cpu()) for x, weight in zip(here, held, strict=True))
    return together(held).all(same)
