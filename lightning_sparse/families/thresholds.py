"""Thresholds: the part of a method that trains thresholds beside its weights.

Thresholds sit in the param group of their weight and are updated with it. Those of all weights of an optimizer lie end
to end, so that one operation completes their gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import Callback, LightningModule, MisconfigurationException, Trainer, is_a
from lightning_sparse.compat.optimizers import stepping, takes_matrices_alone, wrapped
from lightning_sparse.compat.options import option
from lightning_sparse.compat.torch_private import complete_momentum, found_infinite
from lightning_sparse.families.target import Target, Targeted
from lightning_sparse.families.threshold_decay import decay_apart, refuse_unknown_decay
from lightning_sparse.families.threshold_states import ThresholdStates, place
from lightning_sparse.kernels.thresholds import fused, fused_kernels
from lightning_sparse.rules.parts import WHOLE, together
from lightning_sparse.trainer.guards import REMEDY, listed, refuse_other_sparsity
from lightning_sparse.trainer.ownership import Ownership
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.joined import Joined, can_join
from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.latent_group import LatentGroup
from lightning_sparse.weights.thresholds import Granularity, ThresholdBuffer, WeightThresholds, buffers

__all__ = ["Granularity", "ThresholdBuffer", "Thresholded", "Thresholds"]


class _Family(Verbs, Callback, ABC):
    """What a method with thresholds has of the family beside it."""

    _groups: dict[int, LatentGroup]  # by optimizer


class Thresholded(Targeted, _Family):
    """A method with trained thresholds: what it says of them, and what is read of them.

    It stands before the family in a method's bases, as in ``class DST(Thresholded, LatentCallback)``. The gradient of
    ``tau`` goes into ``weight.thresholds.dtau["t"]`` in the method's ``gradients``.
    """

    init_threshold: float | None = option(
        default=0.0,
        check=partial(checks.finite, "Try -5, or -200 to begin dense."),
        doc="the thresholds' value at the start.",
    )
    granularity: Granularity = option(
        default="layer",
        doc='one threshold per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``. With ``sparsity`` '
        "those of a layer are equal.",
    )
    reset_above: float | None = option(
        default=0.99,
        check=partial(checks.fraction, "The paper's value is 0.99; None switches the guard off."),
        doc="collapse guard: a layer with more than this share masked has its forward thresholds set to 0; None "
        "switches the guard off.",
    )
    threshold_weight_decay: float | None = option(
        default=None,
        check=partial(checks.at_least, 0, "None gives thresholds the weight decay of their weights."),
        doc="weight decay of the thresholds, at least 0, in place of that which the optimizer has for their weights. "
        "None: they have the same.",
    )

    #: names of the thresholds of each weight, the forward one, "t", first
    threshold_names: ClassVar[Sequence[str]] = ("t",)

    #: names of further sums that ``gradients`` writes into ``weight.thresholds.dtau``
    sum_names: ClassVar[Sequence[str]] = ()

    #: the loss gains a penalty on the thresholds, whose derivative ``threshold_gradients`` adds
    regularised: ClassVar[bool] = False

    #: the argument in whose place ``sparsity`` is given; None: there is none
    instead_of_sparsity: ClassVar[str | None] = None

    #: either that argument or ``sparsity`` must be given
    needs_one: ClassVar[bool] = False

    #: nothing but the optimizer's weight decay moves the thresholds up
    needs_weight_decay: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Have thresholds."""
        super().__post_init__()
        self._trained: Thresholds | None = Thresholds(self)

    @property
    def _thresholds(self) -> "Thresholds":
        """The thresholds of all weights."""
        assert self._trained is not None
        return self._trained

    @property
    def _target(self) -> Target | None:
        """What the thresholds are shifted to meet, if anything."""
        return self._thresholds.target

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """Turn ``buffer.gradients["t"]``, those of ``tau``, into those of ``t``; add ``share`` times the penalty's."""

    def finish_gradients(
        self, weights: Sequence[LatentWeight], buffers: Sequence[ThresholdBuffer], share: float
    ) -> None:
        """Add what needs the gradients of all weights of the optimizer."""

    @property
    def first_threshold(self) -> float:
        """The forward thresholds' value at the start."""
        return self.init_threshold or 0.0

    # ------------------------------------------------------------------ what users read

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """The forward thresholds by parameter name: ``(out,)``, ``(1,)`` or the weight's shape, after granularity."""
        return {name: weight.thresholds["t"].detach() for name, weight in self._weights.items()}

    @property
    def effective_thresholds(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, ``tau``, by parameter name; of the shape of ``thresholds``."""
        return {name: self.level(t) for name, t in self.thresholds.items()}

    @property
    def state_tensors(self) -> list[Mapping[str, Any]]:  # noqa: D102  (inherited)
        return [*super().state_tensors, *(vars(weight.thresholds) for weight in self._weights.values())]

    def metrics(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return what is logged, with the sparsity that is planned for now."""
        planned = self._target.planned_sparsity if self._target else None
        return super().metrics(counts) | ({} if planned is None else {"sparsity/planned": planned})

    # ------------------------------------------------------------------ a fit begins and ends

    def refuse_trainer(self, trainer: Trainer) -> None:
        """Raise if a callback looks every parameter of the optimizer up in the module."""
        super().refuse_trainer(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(is_a(callback, "BaseFinetuning") for callback in callbacks):
            raise MisconfigurationException(
                f"{self!r} keeps thresholds in the optimizer, where BaseFinetuning cannot handle them. "
                "Freeze weights with requires_grad_(False) and add them later with optimizer.add_param_group."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let thresholds join late, if they do; make sure that a plan, if there is one, can be followed."""
        super().on_train_start(trainer, pl_module)
        if self._thresholds.states.apart:
            for optimizer in trainer.optimizers:
                self._thresholds.join(optimizer, self._groups[id(optimizer)].weights)
            self._ownership = Ownership(trainer.optimizers, self.choices_in(pl_module))
        if self._target:
            self._target.check()

    def warn_at_epoch_end(self) -> None:  # noqa: D102  (inherited)
        super().warn_at_epoch_end()
        self._thresholds.warn(self._weights)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a training that ended before its plan."""
        super().on_train_end(trainer, pl_module)
        if self._target:
            self._target.warn()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the thresholds out of the optimizers where they have joined late, then let go of the module."""
        if stage == "fit":
            self._thresholds.release(self._weights)
        super().teardown(trainer, pl_module, stage)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the family's state, and how far the plan is."""
        return {
            **super().state_dict(),
            **({"target": self._target.state(), "begun": dict(self._before_fit)} if self._target else {}),
            **self._thresholds.states.state_dict(self._weights),
            "granularity": self.granularity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state with thresholds of the same shapes and the same target."""
        self._thresholds.refuse_other_granularity(state_dict["granularity"])
        there = state_dict.get("target", {}).get("sparsity")
        refuse_other_sparsity(self, there, self._target.sparsity if self._target else None)
        if self._target:
            self._target.load(state_dict["target"])
        self._thresholds.states.take(state_dict.get("optimizer", {}))
        super().load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make room for what the checkpoint has by shards of the optimizers' states of thresholds."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self._thresholds.states.apart and state:
            self._thresholds.states.expect(state.get("optimizer", {}), self._weights)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


class Thresholds:
    """The thresholds of all weights of a method.

    Args:
        method: whose they are.
    """

    def __init__(self, method: Thresholded) -> None:
        self.method = method
        self.target = method.new_target()
        self.states = ThresholdStates()
        self._laid_out: dict[int, list[ThresholdBuffer]] = {}
        self._stepping: dict[int, list[Optimizer]] = {}  # those that make the step of each optimizer
        self._nonfinite: dict[ThresholdBuffer, Tensor] = {}  # where, so far

    # ------------------------------------------------------------------ a fit begins and ends

    def refuse_other_granularity(self, there: str) -> None:
        """Raise unless a checkpoint has thresholds of these shapes."""
        if there != self.method.granularity:
            raise MisconfigurationException(
                f"The checkpoint was written with granularity={there!r}, "
                f"this {self.method!r} has {self.method.granularity!r}: give it the same."
            )

    def begin_fit(self, weights: Sequence[LatentWeight], resumed: bool) -> None:
        """Settle who keeps the optimizers' states of thresholds, and where these may stand in param groups."""
        self.states.begin(together(weights) is not WHOLE, resumed)
        if not resumed:
            self.forget_places(weights)

    def begin(self, weight: LatentWeight) -> None:
        """Give a new weight its thresholds."""
        start = dict.fromkeys(self.method.threshold_names, 0.0) | {"t": self.method.first_threshold}
        granularity = self.method.granularity
        weight.trained = WeightThresholds.new(weight.latent, weight.outputs, granularity, start, weight.part)

    def join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Put the thresholds of those of ``weights`` that ``optimizer`` updates into the param groups of these."""
        of = {id(weight.parameter): weight for weight in weights}
        if self.states.apart:
            self.forget_places(weights)
            self.states.join(self.method, optimizer, partial(self.of, optimizer))
        for each in wrapped(optimizer):
            for group in each.param_groups:
                members = [of[id(parameter)] for parameter in group["params"] if id(parameter) in of]
                if members:
                    self._join(each, group, members)
        self.states.restore(optimizer, weights)

    def _join(self, optimizer: Optimizer, group: dict[str, Any], weights: Sequence[LatentWeight]) -> None:
        """Put the thresholds of ``weights`` into their param group."""
        own = self.method.threshold_weight_decay
        if own is not None:
            refuse_unknown_decay(self.method, optimizer)
        driven = group.get("weight_decay") if own is None else own
        if self.method.needs_weight_decay and not self.target and not driven:
            self.method.warn_once(
                f"{self.method!r} has no regulariser of its own, and its thresholds have no weight decay: nothing "
                f"drives {weights[0].name} to be sparse. Set weight_decay in the optimizer, e.g. 3e-5, or "
                "threshold_weight_decay."
            )
        if self.target and not self.train and self.method.granularity != type(self.method).granularity:
            self.method.warn_once(
                f"{self.method!r} gains nothing by granularity: with sparsity all thresholds of a layer are equal. "
                "Leave it out."
            )
        self._refuse_vectors(optimizer, weights)
        theirs = [(weight, key) for weight in weights for key in weight.thresholds.values]
        for weight, key in sorted(theirs, key=lambda of: of[0].thresholds.places.get(of[1], math.inf)):
            place(weight, key, group)
        known = any(weight.parameter in optimizer.state for weight in weights)
        if known and len(wrapped(optimizer)) > 1 and callable(prepare := getattr(optimizer, "init_group", None)):
            prepare(group)  # Lookahead of pytorch_optimizer makes its state of each parameter before the first step

    def _refuse_vectors(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Raise if thresholds cannot join the optimizer of their weights, which takes matrices alone."""
        names = [weight.name for weight in weights if any(t.ndim != 2 for t in weight.thresholds.values.values())]
        if names and takes_matrices_alone(optimizer):
            raise MisconfigurationException(
                f"{self.method!r} trains thresholds, which are vectors, in the optimizer of their weights, but "
                f"{type(optimizer).__name__} takes matrices alone: give {', '.join(names)} another, such as SGD or "
                "AdamW, or take a method without thresholds, such as TopKAST or RigL."
            )

    def lay_out(self, optimizer: Optimizer, group: LatentGroup) -> None:
        """Lay the thresholds of the weights of an optimizer end to end, and the weights that join with theirs."""
        self._stepping[id(optimizer)] = stepping(optimizer)
        of = {weight.thresholds: weight for weight in group.weights}
        laid = buffers(of, self.method.sum_names, lambda thresholds: self._kind(of[thresholds]))
        self._laid_out[id(optimizer)] = group.buffers = laid
        group.weights = [of[thresholds] for buffer in laid for thresholds in buffer.thresholds]
        group.joined = [self._joined(buffer, of) for buffer in laid if buffer.joins]

    def _kind(self, weight: LatentWeight) -> torch.dtype | None:
        """Return the dtype of a weight that is to lie among others of its dtype, None: by itself."""
        device, method = weight.latent.device, self.method
        joins = method.joins and method.granularity != "weight" and fused(device) is not None and can_join(weight)
        return weight.latent.dtype if joins else None

    def _joined(self, buffer: ThresholdBuffer, of: Mapping[WeightThresholds, LatentWeight]) -> Joined:
        """Lay weights end to end whose thresholds are."""
        ours = [of[thresholds] for thresholds in buffer.thresholds]
        shapes = [(weight.thresholds.rows, weight.size // weight.thresholds.rows) for weight in ours]
        per_row = self.method.granularity == "neuron"
        return Joined(ours, buffer, fused_kernels(shapes, per_row, ours[0].latent.device))

    def forget_places(self, weights: Iterable[LatentWeight]) -> None:
        """Let thresholds stand wherever they do in the param groups of this fit."""
        for weight in weights:
            weight.thresholds.places = {}

    def of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return the thresholds that an optimizer has."""
        return [t for buffer in self._laid_out.get(id(optimizer), ()) for t in buffer.parameters]

    def release(self, weights: Mapping[str, LatentWeight]) -> None:
        """Let go of the optimizers; keep how far the plan is."""
        if self.target:
            self.target.release()
        self.states.release(weights)
        self._laid_out, self._stepping, self._nonfinite = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what is laid out for optimizers."""
        return {**self.__dict__, "_laid_out": {}, "_stepping": {}, "_nonfinite": {}}

    # ------------------------------------------------------------------ a step

    def complete_gradients(
        self,
        optimizer: Optimizer,
        weights: Sequence[LatentWeight],
        stepping: Sequence[LatentWeight | Joined],
        share: float,
        scale: float,
    ) -> None:
        """Complete the gradients of the thresholds and hand them out, where there are any.

        Args:
            optimizer: whose step it is.
            weights: all that it has.
            stepping: those that have a gradient, as they are computed with.
            share: see ``Verbs.before_step``.
            scale: likewise.
        """
        laid = self._laid_out.get(id(optimizer), [])
        if self.train:
            _add_up(weights, stepping)
            for buffer in laid:
                buffer.add_parts()
        for buffer in () if self.target else laid:
            self.method.threshold_gradients(buffer, share * scale)
        for weight in weights if self.train else ():
            _hand_out(weight, self.method.regularised and share > 0, rests=self.target is not None)
        if self.target:
            self.target.prepare(optimizer, share)
        self.method.finish_gradients([weight for weight in weights if weight.frozen is None], laid, share)

    @property
    def train(self) -> bool:
        """Some thresholds take steps of their own: they follow no plan, or there are backward ones, which never do."""
        return self.target is None or len(self.method.threshold_names) > 1

    def before_update(self, optimizer: Optimizer) -> None:
        """Make the gradients of thresholds those that the optimizer is to see."""
        if not self.train:
            return
        self.make_finite(optimizer)
        thresholds = self.of(optimizer)
        own = self.method.threshold_weight_decay
        if own is not None:
            decay_apart(optimizer, thresholds, own)
        for each in self._stepping.get(id(optimizer), ()):
            complete_momentum(each, thresholds)

    def make_finite(self, optimizer: Optimizer) -> None:
        """Write 0 where gradients are not finite; only right before the update, as clipping by norm spreads them."""
        skippable = found_infinite(optimizer) is not None  # fused under AMP: may turn out to be no step
        for buffer in self._laid_out.get(id(optimizer), ()):
            for dt in buffer.gradients_in_use():
                if buffer.kernels.known_finite(dt):
                    continue
                if not skippable:
                    self._note(buffer, dt)
                torch.nan_to_num_(dt, 0.0, 0.0, 0.0)

    def _note(self, buffer: ThresholdBuffer, dt: Tensor) -> None:
        """Note by NaN where gradients were not finite, without waiting for an accelerator."""
        if buffer not in self._nonfinite:
            self._nonfinite[buffer] = torch.zeros_like(dt)
        self._nonfinite[buffer].add_(dt, alpha=0)

    def gather(self, optimizer: Optimizer) -> None:
        """Take back thresholds to which the optimizer gave new storage."""
        for buffer in self._laid_out.get(id(optimizer), ()):
            buffer.gather()

    def set_levels(self, weight: LatentWeight) -> None:
        """Set ``tau``, for ``P`` to be made of."""
        weight.thresholds.set_levels(self.method.level)

    def reset_collapsed(
        self, weights: Sequence[LatentWeight], passing: Sequence[int | Tensor | None]
    ) -> list[LatentWeight]:
        """Set the thresholds of layers to 0 of whose weights too few pass; return those whose ``P`` is to be made anew.

        Args:
            weights: any.
            passing: how many of each pass, of what is here; None: the method has no collapse guard.
        """
        if self.method.reset_above is None or self.target:
            return []
        counted: list[Any] = [count for count in passing if count is not None]
        if len(counted) < len(weights):
            return []
        counts = together(weights).total(*counted)
        return [weight for weight, count in zip(weights, counts, strict=True) if self._reset(weight, count)]

    def _reset(self, weight: LatentWeight, passing: int | Tensor) -> bool:
        """Set the thresholds of a layer to 0 if too few of its weights pass; tell whether ``P`` must be made anew."""
        bound, t = self.method.reset_above, weight.thresholds
        assert bound is not None
        masked = (weight.size - passing) / weight.size  # rounded once: exactly 99 % is not more than 0.99
        if isinstance(masked, Tensor):  # on an accelerator: no waiting for the count
            collapsed = masked > bound
            t.resets = t.resets + collapsed
            t["t"].mul_(~collapsed)
            return True
        if masked <= bound:
            return False
        t.resets += 1
        t["t"].zero_()
        return True

    def reset_all_collapsed(self, joined: Joined, passing: int | Tensor | None) -> bool:
        """Do the same with weights that are computed with at once, without waiting for the counts of a GPU."""
        bound = self.method.reset_above
        if bound is None or self.target or not isinstance(passing, Tensor):
            return False
        joined.thresholds.reset_collapsed(passing, bound)
        return True

    def warn(self, weights: Mapping[str, LatentWeight]) -> None:
        """Warn of layers that collapsed, and of gradients that were not finite."""
        for name, weight in weights.items():
            resets = int(weight.thresholds.resets)
            if resets and not weight.diverged:  # of which it has been told
                self.method.warn_once(
                    f"{name} collapsed: over {self.method.reset_above:.0%} of it was masked (so far {resets} x) "
                    "and its thresholds were set to 0. A smaller alpha or learning rate avoids it."
                )
        marked = {id(each) for buffer, noted in self._nonfinite.items() for each in buffer.marked(noted.isnan())}
        found = together([*weights.values()]).total(*(id(weight.thresholds) in marked for weight in weights.values()))
        names = [name for name, count in zip(weights, found, strict=True) if count]
        if names:
            self.method.warn_once(
                f"Gradients were not finite: those of {listed(names)}. Thresholds took no step from them, but the "
                f"weights did, as in any run. {REMEDY}"
            )


def _add_up(weights: Sequence[LatentWeight], stepping: Sequence[LatentWeight | Joined]) -> None:
    """Add the gradients of ``tau`` up to the shape of the thresholds; 0 without a gradient, or where they rest."""
    for weight in weights:
        if not weight.has_gradient or weight.frozen is not None:
            for dt in weight.thresholds.gradients.values():
                dt.zero_()
    for part in stepping:
        if isinstance(part, Joined):
            part.thresholds.fold()
        elif part.frozen is None:
            part.thresholds.fold(part.kernels)


def _hand_out(weight: LatentWeight, regularised: bool, rests: bool) -> None:
    """Give the forward thresholds their gradient, if the loss or a penalty has one and they do not follow a plan."""
    assert weight.parameter is not None
    for t in weight.thresholds.values.values():
        t.grad = None
    if not rests and ((regularised and weight.parameter.requires_grad) or weight.has_gradient):
        weight.thresholds.hand_out("t")
