"""How long a learning-rate schedule is."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lightning_sparse.compat.torch_private import schedules_within

__all__ = ["horizon"]


def horizon(scheduler: Any, limit: int) -> float | None:
    """Return after how many moves a schedule has come to its end; None if it has none, or none that can be seen.

    The end is what ``T_max``, ``total_steps``, ``total_iters`` or the last of ``milestones`` says, which torch's
    schedulers and those of this package have. That of a function (``LambdaLR``) is where it is lowest, unless it is
    still falling there.

    Args:
        scheduler: one of torch, or a composition of several.
        limit: functions are looked at for twice so many moves.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> horizon(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30), limit=100)
        30
    """
    parts = schedules_within(scheduler)
    if parts[0][1] is not scheduler:
        ends = [None if (end := horizon(part, limit)) is None else start + end for start, part in parts]
        return max((end for end in ends if end is not None), default=None)
    if isinstance(scheduler, LambdaLR):
        return _lowest(scheduler.lr_lambdas[0], limit)
    said = (getattr(scheduler, name, None) for name in ("T_max", "total_steps", "total_iters"))
    return next((moves for moves in said if moves), max(getattr(scheduler, "milestones", ()), default=None))


def _lowest(factor: Callable[[int], float], limit: int) -> int | None:
    """Return where a function of the moves is lowest, to a two-thousandth of ``limit``; None if it is still falling."""
    moves = range(0, 2 * limit + 1, max(1, limit // 2000))
    lowest, where = math.inf, 0
    for move in moves:
        try:
            value = float(factor(move))
        except Exception:  # a table, which ends here
            return where
        if value < lowest:
            lowest, where = value, move
    return None if where == moves[-1] else where
