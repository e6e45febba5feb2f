"""Agreement: a checkpoint, or another process, has the arguments and the state that this callback can go on with."""

import ast
import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, distributed

from lightning_sparse.compat.lightning import MisconfigurationException, rank_zero_warn
from lightning_sparse.kernels.structure import check_positions

__all__ = [
    "Saved",
    "compare_arguments",
    "refuse_broken_clock",
    "refuse_broken_positions",
    "refuse_other_counts",
    "refuse_other_ranks",
    "saved",
    "written_arguments",
]

#: arguments that change no result, and those that have an error of their own where they differ
_FREE = {
    "include",
    "exclude",
    "log_every_n_steps",
    "log_layers",
    "plain_checkpoints",
    "storage",
    "sparsity",
    "granularity",
}


def written_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return arguments as a checkpoint keeps them: as they are written in a program.

    >>> written_arguments({"alpha": 0.5, "at": (0.1, 0.2), "exclude": [], "initial": "zeros", "seed": None})
    {'alpha': '0.5', 'at': '[0.1, 0.2]', 'exclude': '[]', 'initial': "'zeros'", 'seed': 'None'}
    """
    return {name: repr(_plain(value)) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else repr(value)


def _same(one: str, other: str) -> bool:
    """Tell whether two written values are equal, as 1 and 1.0 are."""
    return one == other or bool(ast.literal_eval(one) == ast.literal_eval(other))


# ---------------------------------------------------------------------- a checkpoint


def compare_arguments(method: Any, there: Mapping[str, str] | None, must_stay: Collection[str]) -> None:
    """Warn of arguments that shape the result and are others than those of a checkpoint.

    Args:
        method: the callback.
        there: the arguments of the checkpoint; None: it does not tell.
        must_stay: those without which its state means something else.

    Raises:
        MisconfigurationException: one of these is another.
    """
    if there is None:
        return
    here = written_arguments(method.arguments)
    differing = [name for name in here if name in there and name not in _FREE and not _same(there[name], here[name])]
    for name in differing:
        if name in must_stay:
            raise MisconfigurationException(
                f"The checkpoint was written with {name}={there[name]}, this {method!r} has {here[name]}: give it "
                "the same."
            )
    if differing:
        others = [f"{name}={here[name]}, not {there[name]}" for name in differing]
        rank_zero_warn(
            f"{method!r} goes on with other arguments than those of the checkpoint: {'; '.join(others)}. What they "
            "decide at the start of a fit stays as it was. Give the same for a run that goes on as if never stopped."
        )


class Saved(dict[str, Any]):
    """A dictionary of a checkpoint that tells which of its entries is missing.

    >>> Saved("the state of RigL(0.9)", {})["clocks"]
    Traceback (most recent call last):
    lightning...MisconfigurationException: The checkpoint has no 'clocks' in the state of RigL(0.9). ...
    """

    def __init__(self, what: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.what = what

    def __missing__(self, key: str) -> Any:
        raise MisconfigurationException(
            f"The checkpoint has no {key!r} in {self.what}. It was changed after it was written, or is of a version "
            "that kept something else. To start from its weights with fresh state: model = "
            "MyModule.load_from_checkpoint(path), then trainer.fit(model) without ckpt_path."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, dict(self))


def saved(method: Any, state: Mapping[str, Any]) -> Saved:
    """Return the state of a checkpoint as one that names what is missing, there and in the state of each weight."""
    found = Saved(f"the state of {method!r}", state)
    if isinstance(state.get("weights"), Mapping):
        found["weights"] = {
            name: Saved(f"what {method!r} keeps of {name}", weight) for name, weight in state["weights"].items()
        }
    return found


def refuse_broken_clock(method: Any, clock: Mapping[str, Any], counts: Collection[str]) -> None:
    """Raise unless a clock of a checkpoint has these counts, none of them below 0."""
    for name in counts:
        value = clock.get(name)
        if not isinstance(value, int) or value < 0:
            raise MisconfigurationException(
                f"The checkpoint's state of {method!r} must have a clock whose {name!r} is a whole number of at least "
                f"0, got {value!r}. It was changed after it was written: take another checkpoint."
            )


def refuse_other_counts(method: Any, there: Mapping[str, int] | None, here: Mapping[str, int]) -> None:
    """Raise if the masks of a checkpoint have not as many connections as it says; None: it does not tell."""
    for name, count in (there or {}).items():
        if here.get(name, count) != count:
            raise MisconfigurationException(
                f"The checkpoint's mask of {name} has {here[name]} connections, but {method!r} had {count} when it was "
                "written: the mask was changed since. Take another checkpoint, or begin a fit with initial='zeros' or "
                "a file of masks."
            )


def refuse_broken_positions(name: str, positions: Tensor, size: int) -> None:
    """Raise unless positions of connections are ascending, each there once, and below ``size``."""
    try:
        check_positions(positions, (size,))
    except ValueError as error:
        raise MisconfigurationException(
            f"The checkpoint's positions of {name} must be ascending, different and from 0 to {size - 1}: they were "
            "changed after they were written. Take another checkpoint."
        ) from error


# ---------------------------------------------------------------------- other processes


def refuse_other_ranks(method: Any) -> None:
    """Raise, on all processes, if one has other arguments than the first: they would not make the same network."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    mine = type(method).__name__, written_arguments(method.arguments)
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    kind, first = everyone[0]
    for rank, (other, arguments) in enumerate(everyone):
        if other != kind:
            raise MisconfigurationException(
                f"All processes must have the same methods in the same order, but rank 0 has {kind} where rank {rank} "
                f"has {other}. Make callbacks without asking for the rank."
            )
        differing = [name for name in first if arguments[name] != first[name]]
        if differing:
            raise MisconfigurationException(
                f"{differing[0]} must be the same on all processes, but {kind} has {differing[0]}="
                f"{first[differing[0]]} on rank 0 and {arguments[differing[0]]} on rank {rank}. Make callbacks "
                "without asking for the rank; a seed that is left out is that of the first process."
            )
