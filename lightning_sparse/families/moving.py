"""Moving connections: what is made sure of before and after a method moves those of an optimizer's weights."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.shards import local
from lightning_sparse.compat.torch_private import stored_values
from lightning_sparse.rules.parts import together
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.storage.store import Store
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.trainer.guards import warn_of_equal_scores
from lightning_sparse.weights.base import Weight, all_finite
from lightning_sparse.weights.group import WeightGroup

__all__ = ["move", "not_finite"]


class _Method(Protocol):
    """What moving asks of its method."""

    store: Store
    pattern: Pattern
    dense_gradient_to_move: bool

    def units(self, weights: Sequence[Weight]) -> list[Weight]: ...

    def num_active(self, group: WeightGroup) -> int: ...

    def plan(self, group: WeightGroup) -> None: ...

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None: ...

    def target_count(self, group: WeightGroup) -> int | None: ...

    def warn_once(self, message: str) -> None: ...


def not_finite(fit: Fit, weights: Sequence[Weight], optimizer: Optimizer) -> list[str]:
    """Return the names of the parameters of ``optimizer``, ``weights`` first, whose gradients are not finite."""
    names = [weight.name for weight in weights if not weight.finite]
    seen = {id(weight.parameter) for weight in weights}
    others = (p for group in optimizer.param_groups for p in group["params"] if id(p) not in seen)
    broken = {id(p) for p in others if not _finite_gradient(p)}
    if names or not together(weights).any(len(broken)):
        return names
    named = fit.module.named_parameters() if fit.module else ()
    return [name for name, parameter in named if id(parameter) in broken] or ["another parameter"]


def move(method: _Method, weights: Sequence[Weight], group: WeightGroup, scale: float) -> bool:
    """Have a method move connections, make sure that their number is the planned one, and tell whether any moved.

    Args:
        method: whose ``plan`` and ``move`` are called.
        weights: those of the group that have gradients, which are finite.
        group: of one optimizer.
        scale: what gradients are multiplied with (under AMP).

    Raises:
        RuntimeError: the number is another, or groups have more than N connections.
    """
    method.store.before_move(weights)
    versions, before = [weight.mask_version for weight in weights], method.num_active(group)
    by_gradient = method.dense_gradient_to_move
    alike = [weight.name for weight in weights if weight.alike or (by_gradient and weight.gradients_alike)]
    warn_of_equal_scores(method, alike)
    method.plan(group)
    method.move(method.units(weights), group, scale)
    planned, after = method.target_count(group), method.num_active(group)
    if after != (before if planned is None else planned):
        raise RuntimeError(
            f"{method!r} has {after} active weights after moving connections, not "
            f"{before if planned is None else planned}: ``drop`` must return different active positions, and "
            "``grow`` different inactive ones, as many as they are asked for. Of a method of this package, please "
            "report this."
        )
    _refuse_broken_pattern(method, weights)
    return versions != [weight.mask_version for weight in weights]


def _refuse_broken_pattern(method: _Method, weights: Sequence[Weight]) -> None:
    """Raise if groups have more than N connections, unless the weight still has more than fit into all of them.

    Blocks and rows cannot be broken: a method sees nothing else.
    """
    for weight in weights if method.pattern.density < 1 else ():
        within = weight.num_active <= method.pattern.capacity(weight)
        if within and not weight.part.all(method.pattern.fits(weight.mask, weight.outputs)):
            raise RuntimeError(
                f"{method!r} has moved connections of {weight.name} so that they have no pattern any more. In a "
                "method of your own, let self.pattern choose what is dropped and grown, or name N:M in "
                "unfit_patterns."
            )


def _finite_gradient(parameter: Tensor) -> bool:
    """Tell whether a parameter's gradient, if it has one, is finite."""
    return parameter.grad is None or all_finite(stored_values(local(parameter.grad)))
