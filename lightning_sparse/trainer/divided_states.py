"""States in checkpoints of which processes hold parts: their DTensors are saved as the module's weights are.

A full checkpoint has whole tensors. In a distributed one, a folder, each process writes the rows that it holds, and
reads those that it needs, whatever the number of processes was.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from torch import Tensor

from lightning_sparse.compat.lightning import Trainer
from lightning_sparse.compat.lightning_private import saves_by_shards
from lightning_sparse.compat.shards import copied, is_sharded, whole

__all__ = ["gathered", "is_consolidated", "read", "save", "set_aside"]

#: an entry of a state whose shards are beside it
_ASIDE = "lightning_sparse.shards"


def save(trainer: Trainer, checkpoint: Mapping[str, Any], key: str) -> None:
    """Have the state of the callback ``key``, which has DTensors, saved by shards, or whole, as the module's is."""
    states = checkpoint["callbacks"]
    if saves_by_shards(trainer):
        states[key] = set_aside(states[key], key, checkpoint["state_dict"])
    else:
        states[key] = gathered(states[key], trainer.is_global_zero)


def gathered(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Return a state with whole tensors in place of DTensors; all processes call this together.

    Args:
        state: of a method.
        keep: this process has use for the tensors; the others return empty ones.
    """
    return {key: _gathered(value, keep) for key, value in state.items()}


def _gathered(value: Any, keep: bool) -> Any:
    if isinstance(value, Mapping):
        return gathered(value, keep)
    if not is_sharded(value):
        return value
    tensor = whole(value)
    return tensor if keep else tensor.new_empty(0)


def set_aside(state: Mapping[str, Any], key: str, module: dict[str, Any]) -> dict[str, Any]:
    """Return a state without its DTensors, which are put into the module's part of a distributed checkpoint."""
    found = dict(_shards(state, key))
    module.update(found)
    return _without(state) | {_ASIDE: True}


def read(state: Mapping[str, Any], now: Mapping[str, Any], key: str, path: str) -> dict[str, Any]:
    """Return a state of a checkpoint with its DTensors, of which each process reads its part.

    Args:
        state: from the checkpoint.
        now: a state whose DTensors, which stay as they are, are divided as those of the checkpoint are to be; it may
            have more of them.
        key: as it was written.
        path: of the checkpoint, a folder.
    """
    if _ASIDE not in state:
        return dict(state)
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # takes a while
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    written = reader.read_metadata().state_dict_metadata
    found = {name: copied(shards) for name, shards in _shards(now, key) if f"state_dict.{name}" in written}
    load({"state_dict": found}, storage_reader=reader)
    return _with({name: value for name, value in state.items() if name != _ASIDE}, now, key, found)


def is_consolidated(path: str) -> bool:
    """Tell whether this is a file that Lightning's ``consolidate_checkpoint`` has made of a distributed checkpoint.

    Shards are aside as in the folder, but optimizers' states have other names than Lightning reads. What is pickled is
    searched as bytes, so nothing is loaded.
    """
    if not (Path(path).is_file() and is_zipfile(path)):
        return False
    with ZipFile(path) as file:
        pickled = b"".join(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))
    return _ASIDE.encode() in pickled and b"optimizer_states" not in pickled


def _shards(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _shards(value, f"{prefix}/{key}")
        elif is_sharded(value):
            yield f"{prefix}/{key}", value


def _without(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if not is_sharded(value)
    }


def _with(state: Mapping[str, Any], now: Mapping[str, Any], prefix: str, found: Mapping[str, Tensor]) -> dict[str, Any]:
    filled = dict(state)
    for key, value in now.items():
        name = f"{prefix}/{key}"
        if name in found:
            filled[key] = found[name]
        elif isinstance(value, Mapping) and isinstance(filled.get(key), Mapping):
            filled[key] = _with(filled[key], value, name, found)
    return filled
