"""Checkpoints with the nonzeros alone, and what a plain module loads from them."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.kernels.structure import structure
from lightning_sparse.layers.sparse import SparseLayer, dense_weight, sparse_layers
from lightning_sparse.rules import select

__all__ = ["load_dense", "load_for", "make_state_sparse", "sparse_entries", "take_sparse"]

_ENTRIES = ("values", "crow", "col", "weight_shape")


def load_dense(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain module's ``state_dict`` of a checkpoint written with ``storage="sparse"``.

    Weights that are stored densely stay as they are, so any checkpoint may be given.

    Args:
        checkpoint: a file, or what ``torch.load`` has read from it; on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a Trainer, or holds more than tensors and plain values.

    Example:
        >>> from torch import nn
        >>> from lightning_sparse.storage import SparseLinear
        >>> layer = SparseLinear(6, 5, nnz=4)
        >>> nn.Linear(6, 5).load_state_dict(load_dense({"state_dict": layer.state_dict()}))
        <All keys matched successfully>
    """
    if not isinstance(checkpoint, Mapping):
        checks.file("Give a Trainer's checkpoint, or what torch.load has read from it.", checkpoint=checkpoint)
        checkpoint = _read(checkpoint)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        held = (
            ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        )
        raise ValueError(
            f"checkpoint must be a Trainer's, with a 'state_dict' in it, got one that holds {held or 'nothing'}. "
            "Of a state dict alone, give {'state_dict': it}."
        )
    state = dict(state)
    _make_state_dense(state)
    return state


def _read(file: str | os.PathLike[str]) -> Any:
    """Return what ``torch.save`` has written."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with the file
        raise ValueError(
            f"checkpoint must be a file of torch.save with tensors and plain values, got {os.fspath(file)!r}, which "
            f"torch.load refuses ({type(error).__name__}). If it holds more, and you trust it, give torch.load(file, "
            "map_location='cpu', weights_only=False). A file of save_sparse is for lightning_sparse.export.load_sparse."
        ) from error


def _make_state_dense(state: dict[str, Any], leave: Collection[str] = ()) -> None:
    """Put dense weights in the place of sparse layers' entries, in place, but for the layers to ``leave``."""
    for name, entries in take_sparse(state, leave).items():
        state[name] = dense_weight(*entries)


def take_sparse(
    state: dict[str, Any], leave: Collection[str] = ()
) -> dict[str, tuple[Tensor, Tensor, Tensor, tuple[int, ...]]]:
    """Remove sparse layers' entries from a ``state_dict``, in place, but for the layers to ``leave``.

    Returns:
        By name of the dense weight, its values, ``crow``, ``col`` and shape.
    """
    taken = {}
    prefixes = [key[: -len("weight_shape")] for key in state if key.split(".")[-1] == "weight_shape"]
    for prefix in prefixes:
        if prefix[:-1] not in leave and all(prefix + name in state for name in _ENTRIES):
            values, crow, col, shape = (state.pop(prefix + name) for name in _ENTRIES)
            taken[f"{prefix}weight"] = values, crow, col, tuple(shape.tolist())
    return taken


def load_for(module: nn.Module, state: dict[str, Any]) -> None:
    """Make each entry of a ``state_dict`` what the layers of ``module`` load, be they dense or sparse, in place."""
    sparse = sparse_layers(module)
    _make_state_dense(state, leave=sparse)
    for name, layer in sparse.items():
        if f"{name}.weight" in state:
            make_state_sparse(state, name, layer, select.positions(state[f"{name}.weight"] != 0))


def make_state_sparse(state: dict[str, Any], prefix: str, layer: SparseLayer, positions: Tensor) -> None:
    """Put what a sparse layer has in the place of a dense weight that is 0 outside ``positions``, in place."""
    weight = state.pop(f"{prefix}.weight")
    state.update(sparse_entries(prefix, weight, positions, getattr(layer, "groups", 1)))


def sparse_entries(prefix: str, weight: Tensor, positions: Tensor, groups: int) -> dict[str, Tensor]:
    """Return what the ``state_dict`` of a sparse layer has for a dense weight that is 0 outside ``positions``."""
    positions = positions.to(weight.device)
    matrix = structure(positions, tuple(weight.shape), groups).matrix
    entries = weight.reshape(-1)[positions], matrix.crow, matrix.col, torch.tensor(weight.shape)
    return {f"{prefix}.{name}": entry for name, entry in zip(_ENTRIES, entries, strict=True)}
