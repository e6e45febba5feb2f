"""Joining: weights that are added to an optimizer, or unfrozen, while a fit is under way."""

from torch.optim import Optimizer

from lightning_sparse.compat.lightning import rank_zero_info
from lightning_sparse.layers.selection import table
from lightning_sparse.trainer import guards, shards
from lightning_sparse.trainer.ownership import Ownership, owned
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["take_added"]


def take_added(method: Verbs, optimizer: Optimizer, ownership: Ownership) -> None:
    """Have a method take over the weights that have joined an optimizer since the fit started.

    Args:
        method: in a fit.
        optimizer: one of the Trainer's, which may train more than it did.
        ownership: what it trained before; it notes what it trains now.
    """
    fit = method._fit
    assert fit.module is not None
    assert fit.trainer is not None
    theirs = owned(optimizer)
    choices = method.choices_in(fit.module)
    ours = [choice for choice in choices if choice.reason is None and id(choice.parameter) in theirs]
    guards.refuse_replaced(method, ours)
    added = [choice for choice in ours if choice.name not in method._weights]
    if added:
        guards.refuse_overlap(method, added, fit.trainer)
        shards.refuse_parts(method, added, fit.trainer)
        method.attach_added(added, optimizer)
        title = f"{method!r} of lightning_sparse: new in training"
        rank_zero_info(table(title, added, method.planned_density, whole=False))
        fit.module_size = sum(choice.size for choice in choices)
    ownership.note(optimizer, choices)
