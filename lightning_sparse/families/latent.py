"""LatentCallback: methods whose layers compute with ``P = f(W, t)`` while dense latent weights ``W`` are trained.

Between optimizer steps the module's parameter holds ``P``, so every forward, backward, checkpoint and other callback
sees plain sparse weights. For the optimizer's update alone the parameter is given ``W`` (its storage is exchanged, no
copy), with ``dW`` in its gradient; the thresholds sit in the same param group and are updated with it.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import BaseFinetuning, MisconfigurationException
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.matrices import write_matrix
from lightning_sparse.trainer.callback import SparseCallback, refuse_other_weights
from lightning_sparse.weights.latent import LatentWeight, Pool, pools

__all__ = ["Granularity", "LatentCallback", "LatentWeight", "Pool"]

Granularity = Literal["neuron", "layer", "weight"]


class LatentCallback(SparseCallback):
    """Base of the methods with latent weights and, as a rule, learnable thresholds.

    A method defines ``effective`` (the forward function) and ``gradients`` (its derivative); if its
    thresholds act through ``tau = f(t)`` or have a regulariser, ``level`` (f) and ``threshold_gradients``.

    Args:
        init_threshold: the thresholds' value at the start.
        granularity: one threshold per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``.
        include: see ``SparseCallback``.
        exclude: see ``SparseCallback``.
        log_every_n_steps: see ``SparseCallback``.
    """

    _weights: dict[str, LatentWeight]
    _pools: dict[int, list[Pool]]

    #: names of the trainable thresholds of each weight, the forward one, "t", first; empty: the method has none
    threshold_names: Sequence[str] = ("t",)

    #: names of further sums that ``gradients`` writes into ``weight.dtau``
    sum_names: Sequence[str] = ()

    #: names of boolean tensors in each weight's state, all True at first, kept as bits
    mask_names: Sequence[str] = ()

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
        self._pools = {}
        self._nonfinite: Tensor | None = None

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``P = f(W, weight.tau)`` into ``out``.

        Args:
            weight: the weight, with ``tau`` of shape ``(out, 1)`` or ``(out, n)``.
            W: its latent weights ``(out, n)``.
            out: ``(out, n)``.

        Returns:
            How many weights pass, if the method has a collapse guard.
        """

    @abstractmethod
    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """Replace ``dP``, the gradient of ``P``, by ``dW`` and write that of ``tau`` into ``weight.dtau["t"]``."""

    def level(self, t: Tensor) -> Tensor:
        """Return ``tau``, which ``|W|`` is compared with."""
        return t

    def threshold_gradients(self, pool: Pool, share: float) -> bool:
        """Make ``pool.gradients["t"]``, those of ``tau``, those of ``t``, and add ``share`` times the regulariser's.

        Returns:
            Whether there is a regulariser.
        """
        return False

    def finish_gradients(self, pools: Sequence[Pool], share: float) -> None:
        """Add what needs the gradients of all weights of the optimizer."""

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """See the latent weights after an update of ``optimizer``, before ``P`` is made; None: it was broken off."""

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
        return {n: weight.thresholds["t"].detach() for n, weight in self._weights.items() if weight.thresholds}

    @property
    def levels(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, ``tau``, by parameter name; of the shape of ``thresholds``."""
        return {name: self.level(t) for name, t in self.thresholds.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: what it costs where sparsity is exploited."""
        return dict.fromkeys(self._weights, 1.0)

    @property
    def masks(self) -> dict[str, Tensor]:  # noqa: D102  (inherited)
        return {name: self._effective(weight) != 0 for name, weight in self._weights.items()}

    def mask(self, name: str) -> Tensor:  # noqa: D102  (inherited)
        return self._effective(self._weights[name]) != 0

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
                    "buffers": {
                        **{key: buffer.detach() for key, buffer in weight.buffers.items()},
                        **{key: weight.mask(key) for key in weight.bits},
                    },
                    "transposed_groups": weight.transposed_groups,
                    "places": dict(weight.places),
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
        loaded = {name: self._loaded(name, state) for name, state in state_dict["weights"].items()}
        if self._module is None:
            self._weights = loaded
        else:
            self._overwrite(loaded)
        super().load_state_dict(state_dict)

    def _loaded(self, name: str, state: dict[str, Any]) -> LatentWeight:
        """Return a weight as it was saved."""
        thresholds = {key: nn.Parameter(t) for key, t in state["thresholds"].items()}
        weight = LatentWeight(name, state["latent"], thresholds, transposed_groups=state["transposed_groups"])
        weight.places = dict(state.get("places", {}))
        for key, buffer in state["buffers"].items():
            if key in self.mask_names:
                weight.keep_mask(key, buffer)
            else:
                weight.buffers[key] = buffer
        return weight

    @torch.no_grad()
    def _overwrite(self, loaded: dict[str, LatentWeight]) -> None:
        """Write a loaded state into the weights in use."""
        for name, weight in self._weights.items():
            weight.latent.copy_(loaded[name].latent)
            for key, t in weight.thresholds.items():
                t.copy_(loaded[name].thresholds[key])
            for key, buffer in weight.buffers.items():
                buffer.copy_(loaded[name].buffers[key])
            for key in weight.bits:
                weight.keep_mask(key, loaded[name].mask(key))
            self._project(weight)

    # ------------------------------------------------------------------ verbs

    @torch.no_grad()
    def attach(self, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer], resumed: bool) -> None:  # noqa: D102
        if resumed and self._weights:  # none in a checkpoint from before the fit, as LearningRateFinder writes it
            here = {choice.name: tuple(choice.parameter.shape) for choice in choices}
            refuse_other_weights(self, here, {n: tuple(weight.latent.shape) for n, weight in self._weights.items()})
        elif self._weights and not self._continues(choices):
            self._warn_of_other_weights()
            self._weights = {}
        self._weights = {choice.name: self._take(choice, self._weights.get(choice.name)) for choice in choices}
        for weight in self._weights.values() if not resumed else ():
            weight.places = {}
        self._pools = {}
        for optimizer in optimizers:
            self._join(optimizer, list(self._weights.values()))

    @torch.no_grad()
    def attach_more(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        new = {choice.name: self._take(choice, None) for choice in choices}
        self._weights.update(new)
        self._join(optimizer, list(new.values()))

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:  # noqa: D102
        pass

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        ours = self._pools.get(id(optimizer), ())
        for pool in ours:
            for weight in pool.weights:
                self._gradients(weight, share)
            if pool.values:
                self._threshold_gradients(pool, share, scale)
        self.finish_gradients(ours, share)

    @torch.no_grad()
    def enter_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        skippable = getattr(optimizer, "found_inf", None) is not None  # fused under AMP: may turn out to be no step
        for pool in self._pools.get(id(optimizer), ()):
            for dt in pool.gradients_in_use():  # only now: clipping by norm spreads what is not finite
                if not pool.kernels.known_finite(dt):
                    self._make_finite(dt, note=not skippable)
            for weight in pool.weights:
                parameter = weight.parameter
                assert parameter is not None
                steps = parameter.grad is not None or any(t.grad is not None for t in weight.thresholds.values())
                if steps and weight.effective is None:
                    weight.effective = parameter.data
                    parameter.data = weight.latent

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        ours = self._pools.get(id(optimizer), ())
        for pool in ours:
            pool.gather()
        weights = [weight for pool in ours for weight in pool.weights if self._leave(weight)]
        self.updated(optimizer, weights)
        for weight in weights:
            self._project(weight)

    def _check(self, trainer: Any) -> None:
        super()._check(trainer)
        # its bookkeeping looks every parameter of the optimizer up in the module
        if self.threshold_names and any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):
            raise MisconfigurationException(
                f"{type(self).__name__} keeps thresholds in the optimizer, where BaseFinetuning cannot handle them. "
                "Freeze weights with requires_grad_(False) and add them later with optimizer.add_param_group."
            )
        for optimizer in trainer.optimizers:
            if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
                raise MisconfigurationException(
                    f"{type(self).__name__} cannot train with {type(optimizer).__name__}, which changes weights "
                    "outside of its steps, where they must stay sparse. Use an optimizer without train() and eval()."
                )

    @torch.no_grad()
    def leave_step(self) -> None:  # noqa: D102
        weights = [weight for weight in self._weights.values() if self._leave(weight)]
        self.updated(None, weights)
        for weight in self._weights.values():  # also those that were left, but not brought back
            if weight.parameter is not None:
                self._project(weight)

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
            self._pools = {}
            for weight in self._weights.values():
                weight.release()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the Trainer, the module and the optimizers."""
        return {**super().__getstate__(), "_pools": {}}

    # ------------------------------------------------------------------ inside

    def _take(self, choice: ParameterChoice, state: LatentWeight | None) -> LatentWeight:
        """Begin with the parameter's values, or go on with ``state``, and write ``P`` into the parameter."""
        parameter = choice.parameter
        if state is None:
            state = LatentWeight(choice.name, parameter.detach().clone(), {})
            state.transposed_groups = choice.transposed_groups
            state.buffers = self.new_buffers(state.latent)
            for key in self.mask_names:
                state.keep_mask(key, torch.tensor(True))
            for index, key in enumerate(self.threshold_names):
                value = self.init_threshold if index == 0 else 0.0
                state.thresholds[key] = nn.Parameter(self._new_threshold(state, value))
        else:
            state.move_like(parameter)
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

    def _continues(self, choices: Sequence[ParameterChoice]) -> bool:
        """Tell whether the parameters hold just what the state of an earlier fit says."""
        return {choice.name for choice in choices} == set(self._weights) and all(
            choice.parameter.shape == self._weights[choice.name].latent.shape
            and torch.equal(choice.parameter.cpu(), self._effective(self._weights[choice.name]).cpu())
            for choice in choices
        )

    def _join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Put thresholds into the param groups of their weights."""
        by_parameter = {id(weight.parameter): weight for weight in weights}
        joined = [weight for pool in self._pools.get(id(optimizer), ()) for weight in pool.weights]
        for group in optimizer.param_groups:
            members = [by_parameter[id(p)] for p in group["params"] if id(p) in by_parameter]
            if members and self.needs_weight_decay and not group.get("weight_decay"):
                self._warn_once(
                    f"{type(self).__name__} has no regulariser of its own, and this optimizer has no weight decay: "
                    f"nothing drives {members[0].name} to be sparse. Set weight_decay in the optimizer, e.g. 3e-5."
                )
            joined += members
            self._refuse_vectors(optimizer, members)
            theirs = [(weight, key) for weight in members for key in weight.thresholds]
            for weight, key in sorted(theirs, key=lambda of: of[0].places.get(of[1], math.inf)):
                self._place(weight, key, group)
        self._pools[id(optimizer)] = pools(joined, self.sum_names)

    def _place(self, weight: LatentWeight, key: str, group: dict[str, Any]) -> None:
        """Put a threshold into the param group of its weight, where it stood when the checkpoint was written."""
        t = weight.thresholds[key]
        place = next((i for i, p in enumerate(group["params"]) if p is t), len(group["params"]))
        if weight.places.setdefault(key, place) != place:
            raise MisconfigurationException(
                f"The checkpoint has the threshold of {weight.name} at index {weight.places[key]} of its param group; "
                f"here it would be at index {place} and get another tensor's optimizer state. Give the Trainer the "
                "callbacks, and the optimizer the parameters, in the same order as when the checkpoint was written."
            )
        if place == len(group["params"]):
            group["params"].append(t)
            if "param_names" in group:
                group["param_names"].append(f"{weight.name}.{key}")

    def _refuse_vectors(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Raise if thresholds cannot join the optimizer of their weights, which takes matrices alone."""
        names = [weight.name for weight in weights if any(t.ndim != 2 for t in weight.thresholds.values())]
        if names and "Muon" in {kind.__name__ for kind in type(optimizer).__mro__}:
            raise MisconfigurationException(
                f"{type(self).__name__} trains thresholds, which are vectors, in the optimizer of their weights, but "
                f"{type(optimizer).__name__} takes matrices alone: give {', '.join(names)} another, such as SGD or "
                "AdamW, or take a method without thresholds, such as TopKAST or RigL."
            )

    def _gradients(self, weight: LatentWeight, share: float) -> None:
        """Turn the parameter's gradient into that of ``W`` in place, and note those of the thresholds."""
        assert weight.parameter is not None
        if not share:
            weight.parameter.grad = None
        gradient = weight.parameter.grad
        if gradient is None:
            for dt in weight.gradients.values():
                dt.zero_()
            return
        same_layout = gradient.stride() == weight.latent.stride()
        work = gradient if same_layout else torch.empty_like(weight.latent).copy_(gradient)
        dP = weight.matrix(work)
        self.gradients(weight, dP, weight.matrix(weight.latent, "W"))
        weight.fold()
        write_matrix(work, dP, weight.transposed_groups)
        if not same_layout:
            gradient.copy_(work)

    def _threshold_gradients(self, pool: Pool, share: float, scale: float) -> None:
        """Complete the gradients of the forward thresholds and hand them out, where there are any."""
        regularised = self.threshold_gradients(pool, share * scale) and share > 0
        for weight in pool.weights:
            for t in weight.thresholds.values():
                t.grad = None
            assert weight.parameter is not None
            if (regularised and weight.parameter.requires_grad) or weight.has_gradient:
                weight.thresholds["t"].grad = weight.gradients["t"]

    def _make_finite(self, dt: Tensor, note: bool) -> None:
        """Write 0 into ``dt`` where it is not finite, and note that it was not (no waiting for an accelerator)."""
        if note:
            broken = ~torch.isfinite(dt).all()
            self._nonfinite = broken if self._nonfinite is None else self._nonfinite.to(broken.device) | broken
        torch.nan_to_num_(dt, 0.0, 0.0, 0.0)

    def _leave(self, weight: LatentWeight) -> bool:
        """Take ``W`` back from the parameter, which then wants its ``P``; tell whether an update was under way."""
        if weight.effective is None or weight.parameter is None:
            return False
        if weight.parameter.data_ptr() != weight.latent.data_ptr():  # the optimizer gave it new storage
            weight.latent = weight.parameter.data
        weight.parameter.data, weight.effective = weight.effective, None
        return True

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
        if weight.thresholds:
            weight.tau = self.level(weight.per_row())
        passing = self.effective(weight, weight.matrix(weight.latent, "W"), out)
        write_matrix(work, out, weight.transposed_groups)
        if not same_layout:
            P.copy_(work)
        return passing
