"""Guards: what a fit refuses, and what it warns of, before anything trains dense or wrong in silence."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_sparse.compat.lightning import (
    Callback,
    MisconfigurationException,
    Trainer,
    is_a,
    rank_zero_warn,
)
from lightning_sparse.compat.lightning_private import averaged_module, averages_now_and_then
from lightning_sparse.compat.optimizers import wrapped
from lightning_sparse.layers.selection import ParameterChoice, patterns, table
from lightning_sparse.trainer.fit import Processes
from lightning_sparse.trainer.verbs import Verbs

__all__ = [
    "REMEDY",
    "averaging",
    "listed",
    "refuse_capture",
    "refuse_consolidated",
    "refuse_exchanged_optimizers",
    "refuse_missing_state",
    "refuse_older_state",
    "refuse_other_sparsity",
    "refuse_other_weights",
    "refuse_overlap",
    "refuse_pruned",
    "refuse_replaced",
    "refuse_trainer",
    "refuse_unknown_length",
    "refuse_unowned",
    "refuse_unread_checkpoint",
    "refuse_unseen_update",
    "warn_of_averages",
    "warn_of_cautious",
    "warn_of_divergence",
    "warn_of_equal_scores",
    "warn_of_few",
    "warn_of_halted",
    "warn_of_log_interval",
    "warn_of_other_weights",
    "warn_of_strays",
]

#: reason of a weight that no optimizer trains
_UNOWNED = "in no optimizer"

#: what helps a training whose weights or gradients are not finite
REMEDY = (
    "Lower the learning rate, set Trainer(gradient_clip_val=1.0), look at the inputs and the loss, or train in float32 "
    "or bfloat16 in place of float16."
)


class _Warns(Protocol):
    """What a warning asks of its method."""

    def warn_once(self, message: str) -> None: ...


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def refuse_trainer(method: Verbs, trainer: Trainer) -> None:
    """Raise if the strategy or an optimizer cannot train sparse."""
    strategy, remedy = trainer.strategy, "Use a single device or strategy='ddp'."
    whole = isinstance(strategy, Processes) or is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if is_a(strategy, "ModelParallelStrategy"):
        whole, remedy = method.needs_whole_weights is None, method.needs_whole_weights or ""
    if not whole:
        raise MisconfigurationException(
            f"{method!r} needs whole weights on every process; {type(strategy).__name__} may split them. {remedy}"
        )
    optimizers = [each for optimizer in trainer.optimizers for each in wrapped(optimizer)]
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            f"{method!r} cannot train with LBFGS, which evaluates the loss several times within a step. "
            "Use a first-order optimizer such as SGD or AdamW."
        )
    kinds = {kind.__name__ for optimizer in optimizers for kind in type(optimizer).__mro__}
    if "ZeroRedundancyOptimizer" in kinds or averages_now_and_then(trainer):
        raise MisconfigurationException(
            f"{method!r} needs every process to make the same update: ZeroRedundancyOptimizer and model averaging "
            "(model_averaging_period) do not. Use plain DDP with a plain optimizer."
        )


def refuse_unowned(method: Verbs, choices: Sequence[ParameterChoice], optimizers: Sequence[Optimizer]) -> None:
    """Mark the weights that no optimizer owns; raise if nothing is left to make sparse."""
    selected = [choice for choice in choices if choice.reason is None]
    if not selected:
        raise MisconfigurationException(
            f"{method!r} found nothing to make sparse.\n{table('The parameters are:', choices)}\n"
            f"Name weights with include={patterns(choices) or '[...]'}, or take the callback away to train dense."
        )
    owners: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for choice in selected:
        count = owners.get(id(choice.parameter), 0)
        if count == 0:
            choice.reason = _UNOWNED
        elif count > 1:
            raise MisconfigurationException(
                f"{choice.name} is in {count} optimizers or param groups; {method!r} needs it in one. "
                "Leave it to one of them, or keep it dense with exclude."
            )
    if all(choice.reason for choice in selected):
        raise MisconfigurationException(
            f"{method!r} would train nothing sparse: no optimizer owns any of the chosen weights "
            f"({', '.join(choice.name for choice in selected)}). Return them from configure_optimizers."
        )


def warn_of_few(method: Verbs, choices: Sequence[ParameterChoice]) -> None:
    """Warn if less than half of the weights are made sparse by default."""
    weights = [choice for choice in choices if choice.is_weight and choice.parameter.requires_grad]
    weights = [c for c in weights if c.reason != _UNOWNED and (c.can_be_added or not c.on_request)]
    sparse, total = (sum(c.size for c in some) for some in ([c for c in weights if not c.reason], weights))
    if 2 * sparse >= total:
        return
    asked = [choice.name for choice in weights if choice.can_be_added]
    others = [f"{choice.name} ({choice.reason})" for choice in weights if choice.reason and not choice.on_request]
    remedies = [
        f"{listed(asked)} stay dense unless asked for: give include={patterns(choices)} to make them sparse, too, and "
        "say where the outputs of their layers lie with lightning_sparse.register_layer. "
    ] * bool(asked) + [f"These cannot be made sparse: {listed(others)}. "] * bool(others)
    rank_zero_warn(
        f"{method!r} makes only {sparse / total:.1%} of the module's trainable weights sparse, those of layers that it "
        f"knows; its sparsity is of these alone. {''.join(remedies)}sparsity/module is logged for the whole module."
    )


def refuse_overlap(method: Verbs, choices: Sequence[ParameterChoice], trainer: Trainer) -> None:
    """Raise if another method of this Trainer already has one of the weights."""
    mine = {choice.name for choice in choices if choice.reason is None}
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, Verbs) and other is not method and other._fit.trainer is trainer:
            both = sorted(mine & set(other._weights))
            if both:
                raise MisconfigurationException(
                    f"{other!r} and {method!r} both claim {both}. Divide the weights with include and exclude."
                )


def refuse_pruned(method: Verbs, choices: Sequence[ParameterChoice], module: nn.Module) -> None:
    """Raise if ``torch.nn.utils.prune`` masks one of the weights, whose layer computes with fewer than it holds."""
    buffers = {name for name, _ in module.named_buffers()}
    for choice in choices:
        plain = choice.name.removesuffix("_orig")
        if plain != choice.name and f"{plain}_mask" in buffers:
            layer, _, local = plain.rpartition(".")
            raise MisconfigurationException(
                f"torch.nn.utils.prune masks {plain}, so {method!r} would train {choice.name}, of which the layer "
                "computes with a part, and say less sparsity than there is. Call torch.nn.utils.prune.remove("
                f"module.get_submodule({layer!r}), {local!r}) before the fit, which writes the zeros into the weight; "
                "methods with initial='zeros' keep them."
            )


def refuse_replaced(method: Verbs, choices: Sequence[ParameterChoice]) -> None:
    """Raise if a weight of the method is another parameter of the module now."""
    weights = method._weights
    known = [choice for choice in choices if choice.name in weights]
    replaced = [choice.name for choice in known if weights[choice.name].parameter is not choice.parameter]
    if replaced:
        raise MisconfigurationException(
            f"{', '.join(replaced)} became another parameter during the fit, which {method!r} would "
            "leave dense. Keep the layer and write new values into its weight, or begin another fit."
        )


def refuse_capture(method: Verbs) -> None:
    """Raise if this step is captured: a graph repeats its launches, without what the method decides anew."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise MisconfigurationException(
            f"{method!r} cannot be captured in a CUDA graph: what it does differs from step to step. Capture the "
            "forward and backward pass alone, as torch.compile(module, mode='reduce-overhead') does."
        )


def refuse_exchanged_optimizers(method: Verbs, trainer: Trainer) -> None:
    """Raise if the Trainer's optimizers are others than at fit start."""
    if [*map(id, trainer.optimizers)] != [*map(id, method._fit.optimizers)]:
        raise MisconfigurationException(
            f"The Trainer's optimizers have been exchanged since the fit started: {method!r} acts in "
            "the steps of the earlier ones, and under others weights would train dense. Change learning rates and "
            "param groups of the same optimizers, or begin another fit."
        )


def refuse_unseen_update(method: Verbs, unseen: bool, trainer: Trainer) -> None:
    """Raise if an update has passed the hooks on the optimizers by; ``unseen``: one was announced, and none seen."""
    if unseen and getattr(trainer.precision_plugin, "scaler", None) is None:  # which may have skipped it
        kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
        raise MisconfigurationException(
            f"{method!r} acts around the step of {kinds}, but an update was made without it, or its step was "
            "exchanged since the fit started: weights would train dense. Call optimizer.step() of the optimizer that "
            "configure_optimizers returns."
        )


def refuse_unknown_length(method: Verbs, steps: float, purpose: str, known: bool = True) -> None:
    """Raise if ``known`` is False, or the number of steps of the training is not; for a purpose, in words."""
    if not known or math.isinf(steps):
        raise MisconfigurationException(
            f"{method!r} must know how long the training is, {purpose}. Give the Trainer max_epochs or "
            "max_steps, and limit_train_batches if the data have no known length."
        )


# ---------------------------------------------------------------------- checkpoints and earlier fits


def refuse_missing_state(method: Verbs, key: str, callbacks: Mapping[str, Any]) -> None:
    """Raise if a checkpoint's states of callbacks have none of this ``key``."""
    if key in callbacks:
        return
    states = [state for state in callbacks.values() if isinstance(state, dict) and "lightning_sparse" in state]
    others = ", ".join(str(state.get("method", state["lightning_sparse"])) for state in states)
    raise MisconfigurationException(
        f"The checkpoint has no state of {method!r} for its choice of weights: it was written "
        + (f"with {others}. " if others else "without a method of lightning_sparse. ")
        + "To start from its weights with fresh state: model = MyModule.load_from_checkpoint(path), then "
        f"trainer.fit(model) without ckpt_path. To continue, give the Trainer the callback it was written with, "
        f"not this {type(method).__name__}."
    )


def refuse_older_state(method: Verbs, known: bool) -> None:
    """Raise unless a checkpoint's state is ``known``: of a version of this method that keeps the same."""
    if not known:
        raise MisconfigurationException(
            f"The checkpoint was written by an earlier version of {type(method).__name__}, whose state this one "
            "does not take up. To start from its weights with fresh state: model = "
            "MyModule.load_from_checkpoint(path), then trainer.fit(model) without ckpt_path."
        )


def refuse_unread_checkpoint(method: Verbs, trainer: Trainer, restored: bool) -> None:
    """Raise if the fit is resumed from a checkpoint, and no state was loaded."""
    if trainer.ckpt_path and not restored and not trainer.strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"The checkpoint {trainer.ckpt_path} has no state of {method!r}, nor of any other callback: it was written "
            "with save_weights_only=True, and no run can go on from it. To start from its weights: model = "
            "MyModule.load_from_checkpoint(path), then trainer.fit(model) without ckpt_path. FixedMask() keeps its "
            "zeros and makes no others; methods that take initial='zeros' begin with them."
        )


def refuse_consolidated(method: Verbs, trainer: Trainer, reason: BaseException) -> NoReturn:
    """Say what helps, since Lightning could not read the checkpoint, a file that was made of a distributed one."""
    raise MisconfigurationException(
        f"{method!r} cannot go on from {trainer.ckpt_path}: consolidate_checkpoint has made it of a folder, and "
        "Lightning finds no optimizer's state in it. Give ckpt_path the folder, and the Trainer ModelParallelStrategy "
        "with any number of processes. To start from its weights with fresh state: model = "
        "MyModule.load_from_checkpoint(path, strict=False), then a fit with initial='zeros'."
    ) from reason


def refuse_other_weights(
    method: Verbs, here: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise unless the loaded state has just the chosen weights: names and shapes."""
    if here != there:
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise MisconfigurationException(
            f"The checkpoint's state of {method!r} and this module differ in {differing}: "
            "choose the same weights (include, exclude, requires_grad, optimizers) as when it was written."
        )


def refuse_other_sparsity(method: Verbs, there: float | None, here: float | None) -> None:
    """Raise unless the loaded state has the sparsity that the callback was made with."""
    if here != there:
        raise MisconfigurationException(
            f"The checkpoint was written with sparsity={there!r}, this {method!r} has {here!r}: give it the same."
        )


def warn_of_other_weights(method: Verbs) -> None:
    """Warn that the state of an earlier fit is of no use."""
    rank_zero_warn(f"This {method!r} holds the state of an earlier fit of other weights: it starts afresh.")


# ---------------------------------------------------------------------- what goes beside


def averaging(trainer: Trainer) -> list[Callback]:
    """Return the callbacks that average weights over time."""
    kinds = {"StochasticWeightAveraging", "WeightAveraging"}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if kinds & {base.__name__ for base in type(callback).__mro__}]


def warn_of_averages(method: Verbs, trainer: Trainer) -> None:
    """Warn of averages of weights over time that cannot be kept sparse: each is denser than what it is of."""
    for callback in averaging(trainer) if method.moves else ():
        if averaged_module(callback) is None:
            rank_zero_warn(
                f"{type(callback).__name__} averages weights of several steps where {method!r} cannot reach them: what "
                "was nonzero at one of them is so in the average, which is denser than the network unless averaging "
                "begins when connections move no longer. For exact zeros multiply each weight of the averaged module "
                "by callback.masks[name] after the fit."
            )


def warn_of_cautious(method: Verbs, trainer: Trainer) -> None:
    """Warn of optimizers that divide a step by the share of a tensor that takes part in it: zeros take none."""
    for optimizer in (each for one in trainer.optimizers for each in wrapped(one)):
        if any(group.get("caution") for group in optimizer.param_groups):
            rank_zero_warn(
                f"{type(optimizer).__name__} is cautious: it divides a step by the share of the tensor that takes part "
                f"in it. Weights that {method!r} holds at 0 take no part, so the others move too far: 10 times at 90 % "
                "zeros. Use caution=False, or multiply lr by the density."
            )


def warn_of_log_interval(method: Verbs, every: int | None, trainer: Trainer) -> None:
    """Warn if the Trainer writes less often than the method logs."""
    theirs = max(getattr(trainer, "log_every_n_steps", 1), 1)
    if every is not None and trainer.loggers and every % theirs:
        rank_zero_warn(
            f"log_every_n_steps={every} of {method!r} is not a multiple of the Trainer's {theirs}, "
            "so not all of its values reach the logger. "
            f"Set Trainer(log_every_n_steps={every}) or a divisor of it."
        )


# ---------------------------------------------------------------------- what cannot be judged


def warn_of_divergence(method: Verbs, names: Sequence[str], epoch: int) -> None:
    """Warn that weights of these names are not finite."""
    if names:
        method.warn_once(
            f"{method!r} has weights that are not finite: {listed(names)}, after epoch {epoch}. The training has "
            f"diverged, and their magnitudes say nothing any more. {REMEDY}"
        )


def warn_of_halted(method: Verbs, names: Sequence[str]) -> None:
    """Warn of connections that could not move for gradients, of parameters of these names, that are not finite."""
    if names:
        method.warn_once(
            f"{method!r} has moved no connections since gradients are not finite: those of {listed(names)} were not "
            f"when connections were due to move. They move as soon as gradients are finite. {REMEDY}"
        )


def warn_of_strays(method: Verbs, name: str, strays: int) -> None:
    """Warn that so many values were lost that other code wrote into a weight outside of its mask."""
    method.warn_once(
        f"{method!r} has set {strays} values to 0 that other code wrote into {name} where it has no "
        "connections: these stay. To train other weights with connections of their own, load them before "
        "the fit, with initial='zeros' or 'magnitude' where the method takes it."
    )


def warn_of_equal_scores(method: _Warns, names: Sequence[str]) -> None:
    """Warn of weights of these names, whose connections cannot be ranked: their scores are all the same."""
    if names:
        method.warn_once(
            f"{method!r} cannot rank all connections: within {listed(names)} all scores are equal, as where a layer "
            "begins at zero or gets no gradient. It keeps them evenly over rows and columns. Leave such weights dense "
            "with exclude, or begin them at small values."
        )
