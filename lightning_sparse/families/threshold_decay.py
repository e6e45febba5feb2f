"""A weight decay of the thresholds' own, in the param group of their weights.

The optimizer will add the decay of the group to all that is in it. What the thresholds are to have more, or less, is
added before: to their gradient where it becomes a part of that, to their values where it does not (AdamW).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.torch_private import found_infinite, gradient_scale
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["decay_apart", "refuse_unknown_decay"]

_IN_GRADIENT = {"SGD", "ASGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop"}
_DECOUPLED = {"AdamW"}


def refuse_unknown_decay(method: Verbs, optimizer: Optimizer) -> None:
    """Raise unless it is known how an optimizer applies weight decay."""
    if not _kinds(optimizer) & (_IN_GRADIENT | _DECOUPLED):
        raise MisconfigurationException(
            f"{method!r} cannot give thresholds a weight decay of their own under {type(optimizer).__name__}, of which "
            f"it is not known how it applies weight decay. Use one of {', '.join(sorted(_IN_GRADIENT | _DECOUPLED))}, "
            "or leave threshold_weight_decay out."
        )


def decay_apart(optimizer: Optimizer, thresholds: Sequence[nn.Parameter], decay: float) -> None:
    """Let thresholds decay by ``decay`` in the update that is about to run, not by what their param group says.

    Args:
        optimizer: whose update it is.
        thresholds: those that have a gradient take part.
        decay: the factor of their L2 penalty, or of the learning rate where weight decay is decoupled.
    """
    ours = {id(t) for t in thresholds if t.grad is not None}
    for group in optimizer.param_groups:
        for t in group["params"]:
            if id(t) in ours:
                _decay(optimizer, group, t, decay)


def _decay(optimizer: Optimizer, group: dict[str, Any], t: nn.Parameter, decay: float) -> None:
    theirs = group.get("weight_decay", 0.0)
    if _is_decoupled(optimizer, group):
        more = (1 - group["lr"] * decay) / (1 - group["lr"] * theirs) - 1
        found = found_infinite(optimizer)
        t.mul_(1 + (more if found is None else more * (found == 0).to(t.dtype)))
        return
    assert t.grad is not None
    scale: float | Tensor = gradient_scale(optimizer)
    t.grad.add_(t * scale, alpha=(decay - theirs) * (-1 if group.get("maximize") else 1))


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or bool(_kinds(optimizer) & _DECOUPLED)


def _kinds(optimizer: Optimizer) -> set[str]:
    return {kind.__name__ for kind in type(optimizer).__mro__}
