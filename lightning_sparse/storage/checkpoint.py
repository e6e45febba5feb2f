"""Checkpoints with the nonzeros alone, and what a plain module loads from them."""

import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.kernels.structure import check_csr, check_positions, structure
from lightning_sparse.layers.sparse import SparseLayer, dense_weight, sparse_layers
from lightning_sparse.rules import select

__all__ = [
    "check_bytes",
    "check_limit",
    "check_shape",
    "load_dense",
    "load_for",
    "make_state_sparse",
    "sparse_entries",
    "take_sparse",
]

_ENTRIES = ("values", "crow", "col", "weight_shape")
# how many bytes dense weights may take for each byte of their nonzeros, and what they may take in any case
_RATIO, _ALWAYS = 1 << 12, 1 << 30


def load_dense(checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, limit: int | None = None) -> dict[str, Any]:
    """Return the plain module's ``state_dict`` of a checkpoint written with ``storage="sparse"``.

    Weights that are stored densely stay as they are, so any checkpoint may be given.

    Args:
        checkpoint: a file, or what ``torch.load`` has read from it; on the CPU.
        limit: bytes that the dense weights may take together; default: 1 GiB, or 4096 times what their nonzeros take
            if that is more. A broken file may ask for any size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a Trainer, or holds more than tensors and plain values; the nonzeros of a
            layer are incomplete, or not in its weight; the dense weights take more than ``limit``.

    Example:
        >>> from torch import nn
        >>> from lightning_sparse.storage import SparseLinear
        >>> layer = SparseLinear(6, 5, nnz=4)
        >>> nn.Linear(6, 5).load_state_dict(load_dense({"state_dict": layer.state_dict()}))
        <All keys matched successfully>
    """
    check_limit(limit)
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
    _make_state_dense(state, limit=limit)
    return state


def check_limit(limit: int | None) -> None:
    """Raise unless it is a number of bytes, or None."""
    if limit is not None:
        checks.integer(0, "It is in bytes; leave it out for a limit by what the file holds.", limit=limit)


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return the shape that a file has for a tensor; raise if it is none."""
    sizes = shape
    if (
        isinstance(sizes, Tensor)
        and sizes.ndim == 1
        and sizes.dtype in (torch.int32, torch.int64)
        and not sizes.is_meta
    ):
        sizes = sizes.tolist()
    if not isinstance(sizes, list) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"The shape of {name!r} must be whole numbers from 0, got {shape!r:.100}. The file is broken.")
    return tuple(sizes)


def check_bytes(dense: int, held: int, limit: int | None, room: int = 0) -> None:
    """Raise if dense weights take more bytes than they may.

    Args:
        dense: what they take.
        held: what their nonzeros take.
        limit: what they may take; None: what is plausible.
        room: what they may take in any case, if there is no limit.
    """
    limit = max(_ALWAYS, _RATIO * held, room) if limit is None else limit
    if dense > limit:
        raise ValueError(
            f"Dense weights must take no more than limit={limit} bytes, got {dense} for nonzeros of {held}. The file "
            "is broken, or extremely sparse: if you trust it, give limit=... in bytes."
        )


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


def _make_state_dense(
    state: dict[str, Any], leave: Collection[str] = (), limit: int | None = None, room: int = 0
) -> None:
    """Put dense weights in the place of sparse layers' entries, in place, but for the layers to ``leave``.

    Raises:
        ValueError: entries are broken, or the dense weights take more than they may, see ``check_bytes``.
    """
    taken = take_sparse(state, leave)
    dense = sum(math.prod(max(n, 1) for n in shape) * values.itemsize for values, _, _, shape in taken.values())
    check_bytes(dense, sum(x.nbytes for *tensors, _ in taken.values() for x in tensors), limit, room)
    for name, entries in taken.items():
        state[name] = dense_weight(*entries)


def take_sparse(
    state: dict[str, Any], leave: Collection[str] = ()
) -> dict[str, tuple[Tensor, Tensor, Tensor, tuple[int, ...]]]:
    """Remove sparse layers' entries from a ``state_dict``, in place, but for the layers to ``leave``.

    Returns:
        By name of the dense weight, its values, ``crow``, ``col`` and shape.

    Raises:
        ValueError: entries are missing, or are not the nonzeros of a weight; ``state`` is left as it is.
    """
    taken = {}
    prefixes = [key[: -len("weight_shape")] for key in state if key.split(".")[-1] == "weight_shape"]
    for prefix in prefixes:
        here = {name: state[prefix + name] for name in _ENTRIES if prefix + name in state}
        if prefix[:-1] in leave or not here.keys() & {"crow", "col"}:  # of another module's own
            continue
        missing = [prefix + name for name in _ENTRIES if name not in here]
        if missing:
            raise ValueError(f"The state must hold all entries of a sparse layer, but has no {', '.join(missing)}.")
        shape = check_shape(f"{prefix}weight", here["weight_shape"])
        if len(shape) < 2:
            raise ValueError(f"The shape of '{prefix}weight' must have two dimensions or more, got {shape}.")
        check_csr({prefix + name: here[name] for name in ("crow", "col", "values")}, shape, groups=None)
        taken[prefix] = here["values"], here["crow"], here["col"], shape
    for prefix in taken:
        for name in _ENTRIES:
            del state[prefix + name]
    return {f"{prefix}weight": entries for prefix, entries in taken.items()}


def load_for(module: nn.Module, state: dict[str, Any]) -> None:
    """Make each entry of a ``state_dict`` what the layers of ``module`` load, be they dense or sparse, in place."""
    sparse = sparse_layers(module)
    room = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
    _make_state_dense(state, leave=sparse, room=room)
    for name, layer in sparse.items():
        if f"{name}.weight" in state:
            make_state_sparse(state, name, layer, select.positions(state[f"{name}.weight"] != 0))


def make_state_sparse(state: dict[str, Any], prefix: str, layer: SparseLayer, positions: Tensor) -> None:
    """Put what a sparse layer has in the place of a dense weight that is 0 outside ``positions``, in place.

    Raises:
        ValueError: the positions are not in the weight, or it is not 0 outside of them.
    """
    weight = state[f"{prefix}.weight"]
    check_positions(positions, tuple(weight.shape), f"positions of {prefix}.weight")
    if weight.count_nonzero() != weight.reshape(-1)[positions.to(weight.device)].count_nonzero():
        raise ValueError(
            f"{prefix}.weight must be 0 outside of the positions of its connections, got a weight with others. The "
            "checkpoint is broken: give another."
        )
    del state[f"{prefix}.weight"]
    state.update(sparse_entries(prefix, weight, positions, getattr(layer, "groups", 1)))


def sparse_entries(prefix: str, weight: Tensor, positions: Tensor, groups: int) -> dict[str, Tensor]:
    """Return what the ``state_dict`` of a sparse layer has for a dense weight that is 0 outside ``positions``."""
    positions = positions.to(weight.device)
    matrix = structure(positions, tuple(weight.shape), groups).matrix
    entries = weight.reshape(-1)[positions], matrix.crow, matrix.col, torch.tensor(weight.shape)
    return {f"{prefix}.{name}": entry for name, entry in zip(_ENTRIES, entries, strict=True)}
