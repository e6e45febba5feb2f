"""LatentCallback: methods whose layers compute with ``P = f(W, t)`` while dense latent weights ``W`` are trained.

Between optimizer steps the module's parameter holds ``P``, so every forward, backward, checkpoint and other callback
sees plain sparse weights. For the optimizer's update alone the parameter is given ``W`` (its storage is exchanged, no
copy), with ``dW`` in its gradient; the thresholds sit in the same param group and are updated with it.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import checks
from lightning_sparse._lightning import MisconfigurationException, rank_zero_warn
from lightning_sparse.callback import SparseCallback
from lightning_sparse.layers import Choice, as_matrix, write_matrix

__all__ = ["Granularity", "LatentCallback", "LatentWeight"]

Granularity = Literal["neuron", "layer", "weight"]


@dataclass
class LatentWeight:
    """One weight that trains sparse.

    Attributes:
        name: the parameter's name in the LightningModule.
        latent: ``W``, of the parameter's shape.
        thresholds: trainable thresholds by name; ``"t"`` is the forward one. Of shape ``(out,)``, ``(1,)`` or the
            parameter's, after the granularity.
        buffers: further tensors of the parameter's shape that belong to the method's state.
        transposed_groups: see ``layers.Choice``.
        parameter: the module's parameter; None outside fit.
        effective: the storage of ``P`` while the parameter holds ``W``; else None.
        resets: how often the collapse guard set the thresholds to 0.
    """

    name: str
    latent: Tensor
    thresholds: dict[str, nn.Parameter]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    transposed_groups: int = 0
    parameter: nn.Parameter | None = None
    effective: Tensor | None = None
    resets: int | Tensor = 0
    _views: dict[str, Tensor] = field(default_factory=dict)

    def matrix(self, x: Tensor, keep_as: str | None = None) -> Tensor:
        """Return ``x``, of the parameter's shape, as ``(out, n)``; see ``layers.as_matrix``.

        ``keep_as``: a name under which the view is kept for the next call, as long as ``x`` stays where it is.
        """
        kept = self._views.get(keep_as) if keep_as else None
        if kept is not None and kept.data_ptr() == x.data_ptr():
            return kept
        matrix = as_matrix(x, self.transposed_groups)
        if keep_as and matrix.data_ptr() == x.data_ptr():
            self._views[keep_as] = matrix
        return matrix

    def per_row(self, key: str = "t") -> Tensor:
        """Return thresholds as ``(out, 1)`` or ``(out, n)``; kept for the next call, as in ``matrix``."""
        t = self.thresholds[key]
        kept = self._views.get(key)
        if kept is not None and kept.data_ptr() == t.data_ptr():
            return kept
        rows = self.matrix(t.detach()) if t.ndim > 1 else t.detach().unsqueeze(1)
        rows = rows.expand(self.matrix(self.latent).shape[0], -1)
        if rows.data_ptr() == t.data_ptr():
            self._views[key] = rows
        return rows

    def fold(self, dt: Tensor, key: str = "t") -> Tensor:
        """Return the gradient of ``per_row`` as that of the thresholds."""
        t = self.thresholds[key]
        if t.ndim == 1:
            return dt.squeeze(1) if t.shape[0] == dt.shape[0] else dt.sum(0)
        result = torch.empty_like(t)
        view = self.matrix(result).copy_(dt)
        write_matrix(result, view, self.transposed_groups)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        tensors = {
            "latent": self.latent.detach(),
            "buffers": {key: buffer.detach() for key, buffer in self.buffers.items()},
        }
        return {**self.__dict__, **tensors, "parameter": None, "effective": None, "_views": {}}


class LatentCallback(SparseCallback):
    """Base of the methods with latent weights and learnable thresholds.

    A method defines ``effective`` (the forward function), ``gradients`` (its derivative) and, if it has one,
    ``penalty_gradient``.

    Args:
        init_threshold: the thresholds' value at the start.
        granularity: one threshold per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``.
        include: see ``SparseCallback``.
        exclude: see ``SparseCallback``.
        log_every_n_steps: see ``SparseCallback``.
    """

    #: names of the trainable thresholds of each weight, the forward one first
    threshold_names: Sequence[str] = ("t",)

    def __init__(
        self,
        init_threshold: float,
        granularity: Granularity,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        log_every_n_steps: int | None,
    ) -> None:
        super().__init__(include, exclude, log_every_n_steps)
        checks.one_of(get_args(Granularity), granularity=granularity)
        self.init_threshold = init_threshold
        self.granularity = granularity
        self._weights: dict[str, LatentWeight] = {}
        self._owned: dict[int, list[LatentWeight]] = {}
        self._nonfinite: Tensor | None = None

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def effective(self, W: Tensor, t: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``P = f(W, t)`` into ``out``; return how many weights pass if the method has a collapse guard.

        Args:
            W: latent weights ``(out, n)``.
            t: thresholds ``(out, 1)`` or ``(out, n)``.
            out: ``(out, n)``.
        """

    @abstractmethod
    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor, t: Tensor) -> Tensor:
        """Replace ``dP``, the gradient of ``P``, by ``dW`` and return ``dt``, of the shape of ``t``."""

    def penalty_gradient(self, t: Tensor) -> Tensor | None:
        """Return the gradient of the method's regulariser with respect to its forward thresholds, if it has one."""
        return None

    def finish_gradients(self, weights: Sequence[LatentWeight], share: float) -> None:
        """Add what needs the gradients of all weights of the optimizer."""

    #: the method has no regulariser but the optimizer's weight decay, which moves its thresholds
    needs_weight_decay: bool = False

    #: share of masked weights above which the collapse guard sets a layer's thresholds to 0; None: no guard
    reset_above: float | None = None

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """Return further tensors of a weight's state, of its shape."""
        return {}

    # ------------------------------------------------------------------ what users read

    @property
    def latents(self) -> dict[str, Tensor]:
        """The dense latent weights ``W`` by parameter name."""
        return {name: weight.latent.detach() for name, weight in self._weights.items()}

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """The forward thresholds by parameter name: ``(out,)``, ``(1,)`` or the weight's shape, after granularity."""
        return {name: weight.thresholds["t"].detach() for name, weight in self._weights.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: what it costs where sparsity is exploited."""
        return dict.fromkeys(self._weights, 1.0)

    @property
    def gradient_density(self) -> float:
        """Share of all selected weights whose gradient is used."""
        sizes = {name: weight.latent.numel() for name, weight in self._weights.items()}
        if not sizes:
            raise RuntimeError(f"{type(self).__name__} has no weights yet: they are chosen when trainer.fit starts.")
        return sum(share * sizes[name] for name, share in self.layer_gradient_density.items()) / sum(sizes.values())

    @property
    def masks(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: self._effective(weight) != 0 for name, weight in self._weights.items()}

    @torch.no_grad()
    def _effective(self, weight: LatentWeight) -> Tensor:
        """Return ``P``, computed from the state."""
        P = torch.empty_like(weight.latent)
        self._write(weight, P)
        return P

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return latents, thresholds and buffers: tensors and plain values only."""
        return {
            "lightning_sparse": type(self).__name__,
            "granularity": self.granularity,
            "weights": {
                name: {
                    "latent": weight.latent.detach(),
                    "thresholds": {key: t.detach() for key, t in weight.thresholds.items()},
                    "buffers": {key: buffer.detach() for key, buffer in weight.buffers.items()},
                    "transposed_groups": weight.transposed_groups,
                }
                for name, weight in self._weights.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; into the weights in use if fit has begun."""
        if state_dict["granularity"] != self.granularity:
            raise MisconfigurationException(
                f"The checkpoint was written with granularity={state_dict['granularity']!r}, "
                f"this {type(self).__name__} has {self.granularity!r}: give it the same."
            )
        loaded = {
            name: LatentWeight(
                name,
                state["latent"],
                {key: nn.Parameter(t) for key, t in state["thresholds"].items()},
                dict(state["buffers"]),
                state["transposed_groups"],
            )
            for name, state in state_dict["weights"].items()
        }
        if self._module is None:
            self._weights = loaded
        else:
            self._overwrite(loaded)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def _overwrite(self, loaded: dict[str, LatentWeight]) -> None:
        """Write a loaded state into the weights in use."""
        for name, weight in self._weights.items():
            weight.latent.copy_(loaded[name].latent)
            for key, t in weight.thresholds.items():
                t.copy_(loaded[name].thresholds[key])
            for key, buffer in weight.buffers.items():
                buffer.copy_(loaded[name].buffers[key])
            self._project(weight)

    # ------------------------------------------------------------------ verbs

    @torch.no_grad()
    def attach(self, choices: Sequence[Choice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        if resumed and self._weights:  # none in a checkpoint of before the fit, as LearningRateFinder writes it
            self._refuse_other_weights(choices)
        elif self._weights and not self._continues(choices):
            rank_zero_warn(
                f"This {type(self).__name__} holds the state of an earlier fit of other weights: it starts afresh."
            )
            self._weights = {}
        self._weights = {choice.name: self._take(choice, self._weights.get(choice.name)) for choice in choices}
        self._owned = {id(optimizer): [] for optimizer in optimizers}
        for optimizer in optimizers:
            self._join(optimizer, list(self._weights.values()))

    @torch.no_grad()
    def attach_more(self, choices: Sequence[Choice], optimizer: Optimizer) -> None:  # noqa: D102
        new = {choice.name: self._take(choice, None) for choice in choices}
        self._weights.update(new)
        self._join(optimizer, list(new.values()))

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: D102
        pass

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        with_gradient = []
        for weight in self._owned.get(id(optimizer), ()):
            assert weight.parameter is not None
            for threshold in weight.thresholds.values():
                threshold.grad = None
            if not share:
                weight.parameter.grad = None
            t = weight.thresholds["t"]
            if weight.parameter.grad is not None:
                t.grad = self._gradients(weight, weight.parameter.grad)
                with_gradient.append(weight)
            penalty = self.penalty_gradient(t.detach()) if share else None
            if penalty is not None:
                t.grad = penalty.mul_(share * scale) if t.grad is None else t.grad.add_(penalty, alpha=share * scale)
        if with_gradient:
            self.finish_gradients(with_gradient, share)

    @torch.no_grad()
    def enter_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        skippable = getattr(optimizer, "found_inf", None) is not None  # fused under AMP: may turn out to be no step
        for weight in self._owned.get(id(optimizer), ()):
            parameter = weight.parameter
            assert parameter is not None
            for t in weight.thresholds.values():  # only now: clipping by norm spreads what is not finite
                if t.grad is not None:
                    self._make_finite(t.grad, note=not skippable)
            if weight.effective is None and (parameter.grad is not None or weight.thresholds["t"].grad is not None):
                weight.effective = parameter.data
                parameter.data = weight.latent

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        for weight in self._owned.get(id(optimizer), ()):
            self._leave(weight)

    @torch.no_grad()
    def leave_step(self) -> None:  # noqa: D102
        for weight in self._weights.values():
            self._leave(weight)

    def report_trouble(self) -> None:  # noqa: D102
        for name, weight in self._weights.items():
            if int(weight.resets):
                self._warn_once(
                    f"{name} collapsed: over {self.reset_above:.0%} of it was masked (so far {int(weight.resets)} x) "
                    "and its thresholds were set to 0. A smaller alpha or learning rate avoids it."
                )
        if self._nonfinite is not None and bool(self._nonfinite):
            self._warn_once(
                "Gradients were not finite: thresholds took no step from them, but the weights did, as in any run. "
                "Look at the loss, the learning rate or gradient_clip_val."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the module; keep the state on the CPU, where Lightning moves the module, too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._owned = {}
            for weight in self._weights.values():
                weight.parameter = None
                weight.latent = weight.latent.cpu()
                weight.buffers = {key: buffer.cpu() for key, buffer in weight.buffers.items()}
                for t in weight.thresholds.values():
                    t.data = t.data.cpu()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer, the module and the optimizers."""
        return {**super().__getstate__(), "_owned": {}}

    # ------------------------------------------------------------------ inside

    def _take(self, choice: Choice, state: LatentWeight | None) -> LatentWeight:
        """Begin with the parameter's values, or go on with ``state``, and write ``P`` into the parameter."""
        parameter = choice.parameter
        if state is None:
            state = LatentWeight(choice.name, parameter.detach().clone(), {})
            state.transposed_groups = choice.transposed_groups
            state.buffers = self.new_buffers(state.latent)
            for index, key in enumerate(self.threshold_names):
                value = self.init_threshold if index == 0 else 0.0
                state.thresholds[key] = nn.Parameter(self._new_threshold(state, value))
        else:
            state.latent = torch.empty_like(parameter).copy_(state.latent)
            state.buffers = {
                key: torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
                for key, buffer in state.buffers.items()
            }
            for t in state.thresholds.values():  # the same objects, which the optimizer may know from an earlier fit
                like = parameter if t.ndim > 1 else t
                t.data = torch.empty_like(like, dtype=t.dtype, device=parameter.device).copy_(t.data)
                t.grad = None
            state.transposed_groups = choice.transposed_groups
        state.parameter = parameter
        state.effective = None
        self._project(state)
        return state

    def _new_threshold(self, weight: LatentWeight, value: float) -> Tensor:
        """Return thresholds in at least float32, since their steps are small."""
        dtype = torch.promote_types(weight.latent.dtype, torch.float32)
        if self.granularity == "weight":
            return torch.full_like(weight.latent, value, dtype=dtype)  # in the same order of memory
        count = len(weight.matrix(weight.latent)) if self.granularity == "neuron" else 1
        return torch.full((count,), value, dtype=dtype, device=weight.latent.device)

    def _continues(self, choices: Sequence[Choice]) -> bool:
        """Tell whether the parameters hold just what the state of an earlier fit says."""
        return {choice.name for choice in choices} == set(self._weights) and all(
            choice.parameter.shape == self._weights[choice.name].latent.shape
            and torch.equal(choice.parameter.cpu(), self._effective(self._weights[choice.name]).cpu())
            for choice in choices
        )

    def _refuse_other_weights(self, choices: Sequence[Choice]) -> None:
        """Raise unless the loaded state has just the chosen weights."""
        here = {choice.name: tuple(choice.parameter.shape) for choice in choices}
        there = {name: tuple(weight.latent.shape) for name, weight in self._weights.items()}
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise MisconfigurationException(
                f"The checkpoint's state of {type(self).__name__} and this module differ in {differing}: "
                "choose the same weights (include, exclude, requires_grad, optimizers) as when it was written."
            )

    def _join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Put thresholds into the param groups of their weights."""
        by_parameter = {id(weight.parameter): weight for weight in weights}
        for group in optimizer.param_groups:
            members = [by_parameter[id(p)] for p in group["params"] if id(p) in by_parameter]
            if members and self.needs_weight_decay and not group.get("weight_decay"):
                self._warn_once(
                    f"{type(self).__name__} has no regulariser of its own, and this optimizer has no weight decay: "
                    f"nothing drives {members[0].name} to be sparse. Set weight_decay in the optimizer, e.g. 3e-5."
                )
            for weight in members:
                self._owned[id(optimizer)].append(weight)
                for key, t in weight.thresholds.items():
                    if any(p is t for p in group["params"]):
                        continue
                    group["params"].append(t)
                    if "param_names" in group:
                        group["param_names"].append(f"{weight.name}.{key}")

    def _gradients(self, weight: LatentWeight, gradient: Tensor) -> Tensor:
        """Turn the parameter's gradient into that of ``W`` in place; return that of the thresholds."""
        same_layout = gradient.stride() == weight.latent.stride()
        work = gradient if same_layout else torch.empty_like(weight.latent).copy_(gradient)
        dP = weight.matrix(work)
        dt = self.gradients(weight, dP, weight.matrix(weight.latent, "W"), weight.per_row())
        write_matrix(work, dP, weight.transposed_groups)
        if not same_layout:
            gradient.copy_(work)
        return weight.fold(dt)

    def _make_finite(self, dt: Tensor, note: bool) -> None:
        """Write 0 into ``dt`` where it is not finite, and note that it was not (no waiting for an accelerator)."""
        if dt.device.type == "cpu" and math.isfinite(dt.sum()):
            return
        if note:
            broken = ~torch.isfinite(dt).all()
            self._nonfinite = broken if self._nonfinite is None else self._nonfinite.to(broken.device) | broken
        torch.nan_to_num_(dt, 0.0, 0.0, 0.0)

    def _leave(self, weight: LatentWeight) -> None:
        """Take ``W`` back from the parameter and give it ``P``, if an update was under way."""
        if weight.effective is not None and weight.parameter is not None:
            if weight.parameter.data_ptr() != weight.latent.data_ptr():  # the optimizer gave it new storage
                weight.latent = weight.parameter.data
            weight.parameter.data, weight.effective = weight.effective, None
            self._project(weight)

    def _project(self, weight: LatentWeight) -> None:
        """Write ``P`` into the parameter, after the collapse guard."""
        assert weight.parameter is not None
        P = weight.parameter.data
        passing = self._write(weight, P)
        if self.reset_above is None or passing is None:
            return
        masked = (P.numel() - passing) / P.numel()  # rounded once: exactly 99 % is not more than 0.99
        if isinstance(masked, Tensor):  # on an accelerator: no waiting for the count
            collapsed = masked > self.reset_above
            weight.resets = weight.resets + collapsed
            weight.thresholds["t"].mul_(~collapsed)
            self._write(weight, P)
        elif masked > self.reset_above:
            weight.resets += 1
            weight.thresholds["t"].zero_()
            self._write(weight, P)

    def _write(self, weight: LatentWeight, P: Tensor) -> int | Tensor | None:
        """Write ``P = f(W, t)``."""
        same_layout = P.stride() == weight.latent.stride()
        work = P if same_layout else torch.empty_like(weight.latent)
        out = weight.matrix(work, "P" if same_layout else None)
        passing = self.effective(weight.matrix(weight.latent, "W"), weight.per_row(), out)
        write_matrix(work, out, weight.transposed_groups)
        if not same_layout:
            P.copy_(work)
        return passing
