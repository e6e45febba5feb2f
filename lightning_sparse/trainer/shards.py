"""Shards: weights of which each process holds a part, as FSDP2 and tensor parallelism divide them.

What a fit refuses of them, and what it warns of. What is done with them stands in ``rules/parts.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.compat.lightning import MisconfigurationException, Trainer, is_a, rank_zero_warn
from lightning_sparse.compat.shards import Layout, is_sharded, layout, local
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.parts import Shard
from lightning_sparse.rules.patterns import Pattern
from lightning_sparse.trainer.fit import Processes
from lightning_sparse.trainer.guards import listed
from lightning_sparse.trainer.verbs import Verbs

__all__ = [
    "divides_weights",
    "identical_parts",
    "refuse_parts",
    "refuse_parts_of_rows",
    "refuse_parts_of_units",
    "unfit_layout",
    "warn_of_identical_parts",
]

_SEEN = 16  # numbers of a part that are compared with those of the others


def divides_weights(trainer: Trainer) -> bool:
    """Tell whether processes may hold parts of weights."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def refuse_parts(method: Verbs, choices: Sequence[ParameterChoice], trainer: Trainer) -> None:
    """Raise unless each weight is divided as is known, or none is, and nothing divides them."""
    divided = divides_weights(trainer) or any(is_sharded(choice.parameter) for choice in choices)
    for choice in choices if divided else ():
        reason = _reason(method, choice, trainer)
        if reason is not None:
            raise MisconfigurationException(f"{method!r} cannot train {choice.name} sparse: {reason}")


def _reason(method: Verbs, choice: ParameterChoice, trainer: Trainer) -> str | None:
    if not is_sharded(choice.parameter):
        return (
            "it is no DTensor, so processes would train it each by itself. Call fully_shard on its module in "
            "configure_model, or name the module in the plan of parallelize_module, or leave it out with exclude."
        )
    if not (divides_weights(trainer) or isinstance(trainer.strategy, Processes)):
        return "it is a DTensor, which only ModelParallelStrategy trains. Use that, or plain parameters."
    if not (divides_weights(trainer) or method.takes_tensor_parallel):
        return "it is a DTensor, which this method trains with a Trainer only. Use that, or a method such as RigL."
    if method.needs_whole_weights is not None:
        return f"it is a DTensor, of which each process holds a part. {method.needs_whole_weights}"
    divided = layout(choice.parameter)
    remedy = unfit_layout(method, divided, trainer)
    if remedy is not None:
        return f"it is divided as {divided.placements} over {divided.mesh}. {remedy}"
    if choice.nonempty is not None:
        return (
            "its rows are divided by their norms, as by weight_norm, so none may be empty, which is not looked after "
            "where processes hold a part each. Leave it out with exclude."
        )
    return None


def unfit_layout(method: Verbs, divided: Layout, trainer: Trainer) -> str | None:
    """Return what helps if a weight is divided in a way that is not known; None: it is known."""
    if not divided.is_known:
        return "Only Shard and Replicate are known. Leave it out with exclude."
    if not _averaged(divided, trainer):
        return (
            "Its gradients are not averaged over all processes that have other batches. Call fully_shard on its module "
            "with mesh=self.device_mesh['data_parallel']."
        )
    cut = {placement.dim for placement in divided.placements if not placement.is_replicate()}
    if len(cut - {0}) > 1:
        return "Rows and one other dimension may be divided. Choose another plan, or leave it out with exclude."
    by_rows = divided.by_rows and divided.mesh.size() == len(_with_other_batches(trainer)) == trainer.world_size
    if not by_rows and not method.takes_tensor_parallel:
        return (
            "This method trains weights whose rows are divided over all processes, as by fully_shard with "
            "tensor_parallel_size=1. Divide it so, or leave it out with exclude."
        )
    return None


def _averaged(divided: Layout, trainer: Trainer) -> bool:
    """Tell whether the processes of different batches are among those of a weight's mesh."""
    return _with_other_batches(trainer) <= {*divided.mesh.mesh.flatten().tolist()}


def _with_other_batches(trainer: Trainer) -> set[int]:
    """Return the processes each of which has batches of its own."""
    mesh = getattr(trainer.strategy, "device_mesh", None)  # none in a loop of one's own
    return {*(range(trainer.world_size) if mesh is None else mesh["data_parallel"].mesh.flatten().tolist())}


def refuse_parts_of_rows(method: Verbs, choices: Sequence[ParameterChoice]) -> None:
    """Raise if processes share a weight along another dimension than its outputs."""
    for choice in choices:
        if is_sharded(choice.parameter) and not (choice.outputs == FIRST and layout(choice.parameter).by_rows):
            raise MisconfigurationException(
                f"{method!r} trains weights that processes share only if each holds some outputs, with all that they "
                f"read, but {choice.name} of {choice.kind} is divided otherwise. Leave it out with exclude, or use a "
                "method with masks and pattern='unstructured', such as RigL."
            )


def refuse_parts_of_units(method: Verbs, choices: Sequence[ParameterChoice], pattern: Pattern) -> None:
    """Raise if a group of N:M, a row or a block may lie on several processes."""
    if pattern.kind != "unstructured":
        refuse_parts_of_rows(method, choices)
        _refuse_cut_blocks(method, choices, pattern)


def _refuse_cut_blocks(method: Verbs, choices: Sequence[ParameterChoice], pattern: Pattern) -> None:
    """Raise if a block of the pattern lies on several processes."""
    for choice in choices:
        tiles = pattern.units(choice.shape, choice.outputs)
        each = layout(choice.parameter).rows_each if is_sharded(choice.parameter) else 0
        if tiles is not None and each % tiles.rows:
            raise MisconfigurationException(
                f"{method!r} needs each block of {tiles.rows} rows on one process, but processes hold {each} rows each "
                f"of {choice.name}, no multiple of {tiles.rows}. Give blocks of another size, use another number of "
                "processes, or leave the weight out with exclude."
            )


def identical_parts(choices: Sequence[ParameterChoice]) -> list[str]:
    """Return the names of weights of which several processes have the same numbers."""
    divided = [(c.name, local(c.parameter), layout(c.parameter)) for c in choices if is_sharded(c.parameter)]
    return [name for name, values, of in divided if _identical(Shard(of, values.device), values)]


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


def _identical(part: Shard, values: Tensor) -> bool:
    """Tell whether two processes have the same first numbers, which are not all equal."""
    first = torch.zeros(part.numbers, _SEEN, dtype=torch.float64)
    own = values.detach().reshape(-1)[:_SEEN].double().cpu()
    first[part.number, : len(own)] = own
    samples = part.sums(first)
    drawn = [sample for sample in samples if bool((sample != sample[0]).any())]
    return any(bool((a == b).all()) for i, a in enumerate(drawn) for b in drawn[:i])
