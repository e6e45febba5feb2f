"""Shards: weights of which each process holds some rows, as FSDP2 divides them under ModelParallelStrategy.

What a fit refuses of them, and what it warns of. What is done with them stands in ``rules/parts.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.compat.lightning import MisconfigurationException, Trainer, is_a, rank_zero_warn
from lightning_sparse.compat.shards import is_sharded, layout, local
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.parts import Rows
from lightning_sparse.trainer.guards import listed
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["divides_weights", "identical_parts", "refuse_parts", "refuse_parts_of_rows", "warn_of_identical_parts"]

_SEEN = 16  # numbers of a part that are compared with those of the others


def divides_weights(trainer: Trainer) -> bool:
    """Tell whether processes may hold parts of weights."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def refuse_parts(method: Verbs, choices: Sequence[ParameterChoice], trainer: Trainer) -> None:
    """Raise unless each weight is divided by rows over all processes, or none is, and nothing divides them."""
    for choice in choices:
        reason = _reason(choice, trainer)
        if reason is not None:
            raise MisconfigurationException(f"{method!r} cannot train {choice.name} sparse: {reason}")


def _reason(choice: ParameterChoice, trainer: Trainer) -> str | None:
    if not is_sharded(choice.parameter):
        if not divides_weights(trainer):
            return None
        return (
            "it is no DTensor, so processes would train it each by itself. Call fully_shard on its module in "
            "configure_model, or leave it out with exclude."
        )
    if not divides_weights(trainer):
        return "it is a DTensor, which only ModelParallelStrategy trains. Use that, or plain parameters."
    divided = layout(choice.parameter)
    if not divided.by_rows or divided.mesh.size() != trainer.world_size:
        return (
            f"it is divided as {divided.placements} over {divided.mesh.size()} of {trainer.world_size} processes. "
            "Only rows divided over all processes are known, as by fully_shard with data_parallel_size of all "
            "devices and tensor_parallel_size=1. Leave weights under tensor parallelism out with exclude."
        )
    if choice.nonempty is not None:
        return (
            "its rows are divided by their norms, as by weight_norm, so none may be empty, which is not looked after "
            "where processes hold some rows each. Leave it out with exclude."
        )
    return None


def refuse_parts_of_rows(method: Verbs, choices: Sequence[ParameterChoice]) -> None:
    """Raise if processes share a weight otherwise than by outputs with all that they read."""
    for choice in choices:
        if is_sharded(choice.parameter) and (choice.outputs != FIRST or not layout(choice.parameter).by_rows):
            raise MisconfigurationException(
                f"{method!r} trains weights that processes share only if each holds some outputs, with all that they "
                f"read, but {choice.name} of {choice.kind} is divided otherwise. Leave it out with exclude, or use a "
                "method with masks, such as RigL."
            )


def identical_parts(choices: Sequence[ParameterChoice]) -> list[str]:
    """Return the names of weights of which several processes have the same numbers."""
    divided = [(c.name, local(c.parameter), layout(c.parameter)) for c in choices if is_sharded(c.parameter)]
    return [name for name, values, of in divided if _identical(Rows(of, values.device), values)]


def warn_of_identical_parts(method: Verbs, names: Sequence[str]) -> None:
    """Warn of weights of these names, for whose parts several processes have drawn the same numbers."""
    if names:
        rank_zero_warn(
            f"{method!r} trains weights of which several processes began with the same numbers: {listed(names)}. Where "
            "a module made on the meta device is initialised after fully_shard, each process draws the same numbers "
            "for its rows if its seed is the same, so neurons come in identical groups. Seed processes by their rank "
            "before the values are drawn, as with torch.manual_seed(seed + self.global_rank) in configure_model, or "
            "load a checkpoint."
        )


def _identical(rows: Rows, values: Tensor) -> bool:
    """Tell whether two processes have the same first numbers, which are not all equal."""
    first = torch.zeros(rows.world, _SEEN, dtype=torch.float64)
    own = values.detach().reshape(-1)[:_SEEN].double().cpu()
    first[rows.rank, : len(own)] = own
    samples = rows.sums(first)
    drawn = [sample for sample in samples if bool((sample != sample[0]).any())]
    return any(bool((a == b).all()) for i, a in enumerate(drawn) for b in drawn[:i])
