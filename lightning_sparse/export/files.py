"""Files whose size is in proportion to the weights that are not zero, in the safetensors format."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.kernels.structure import check_positions, flat_positions
from lightning_sparse.storage.checkpoint import check_bytes, check_limit, check_shape, take_sparse

__all__ = ["load_sparse", "save_sparse"]

_FORMAT = "lightning_sparse 1"
# what the header of a file takes up for one more tensor, about
_ENTRY = 200
_CODED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def save_sparse(state: Mapping[str, Tensor] | nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a state dict so that zeros take no room.

    A tensor with zeros enough is written as ``NAME.indices``, flat and int32 (int64 from 2**31 elements), and
    ``NAME.values``; any other one as it is. The nonzeros of sparse layers are written as those of the plain module's
    ``weight``, without making that. Tied tensors are written once. The file is safetensors, with what is needed to put
    the tensors together in its header.

    Every bit comes back with ``load_sparse``, but for two things: -0.0 becomes 0.0 where a tensor is written sparsely
    (multiplying by a mask leaves -0.0 behind, which would take room), and memory formats such as channels-last become
    contiguous.

    Args:
        state: a state dict of tensors, or a module that has one; also with sparse layers.
        path: of the file; it is overwritten.

    Raises:
        ValueError: an entry is not a dense tensor (of a Lightning checkpoint, give ``checkpoint["state_dict"]``), or
            names collide, or ``path`` is no path of a file.
        FileNotFoundError: the folder of the file does not exist.

    Example:
        >>> import os, tempfile, torch
        >>> from lightning_sparse.export import load_sparse, save_sparse
        >>> weight = torch.zeros(1000, 1000)
        >>> weight[0] = 1.0
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> save_sparse({"weight": weight}, path)
        >>> os.path.getsize(path) < 9000  # 8 bytes a nonzero; dense: 4,000,000
        True
        >>> torch.equal(load_sparse(path)["weight"], weight)
        True
    """
    if not isinstance(state, (Mapping, nn.Module)):
        raise ValueError(f"state must be a state dict or a module, got one of type {type(state).__name__}.")
    checks.folder_of(path=path)
    state = dict(state.state_dict() if isinstance(state, nn.Module) else state)
    if others := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"state must hold tensors by name, got the keys {others[:3]}. Give module.state_dict().")
    layers = take_sparse(state)
    state.update({name: values for name, (values, *_) in layers.items()})
    parts: dict[str, Tensor] = {}
    sparse: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"state must hold dense tensors, but {name!r} is {_describe(tensor)}. "
                "Of a Lightning checkpoint, give checkpoint['state_dict']."
            )
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        shape = layers[name][3] if name in layers else tuple(tensor.shape)
        coded = _code_layer(*layers[name]) if name in layers else _code(tensor)
        if coded is None:
            new = {name: tensor.cpu().contiguous().clone()}
        else:
            new = {f"{name}.indices": coded[0].cpu(), f"{name}.values": coded[1].cpu()}
            sparse[name] = list(shape)
        if parts.keys() & new.keys():
            raise ValueError(f"names in state must not collide, but {name!r} is written as {sorted(new)}. Rename it.")
        parts.update(new)
    metadata = {"format": _FORMAT, "sparse": json.dumps(sparse), "tied": json.dumps(tied)}
    extra("safetensors.torch", "export").save_file(parts, os.fspath(path), metadata=metadata)


def load_sparse(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, limit: int | None = None
) -> dict[str, Tensor]:
    """Return the plain state dict that ``save_sparse`` wrote; tied tensors are one tensor again.

    Args:
        path: of the file.
        device: where the tensors go.
        limit: bytes that the tensors that are written sparsely may take together; default: 1 GiB, or 4096 times what
            they take in the file if that is more. A broken file may ask for any size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ``save_sparse``, is broken, or its tensors take more than ``limit``.

    Example:
        >>> import os, tempfile, torch
        >>> from lightning_sparse.export import load_sparse, save_sparse
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> net = torch.nn.Linear(3, 2)
        >>> save_sparse(net, path)
        >>> net.load_state_dict(load_sparse(path))
        <All keys matched successfully>
    """
    safetensors = extra("safetensors", "export")
    check_limit(limit)
    checks.file("Give one that save_sparse has written.", path=path)
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one of torch, such as 'cpu' or 'cuda:0', got {device!r}.") from error
    try:
        opened = safetensors.safe_open(os.fspath(path), framework="pt", device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(_other(path, f"it is not a safetensors file ({error})")) from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(_other(path, f"its format is {metadata.get('format')!r}"))
        try:
            return _state(file, _names(metadata, "sparse"), _names(metadata, "tied"), limit)
        except ValueError as error:
            raise ValueError(_other(path, str(error))) from error


def _names(metadata: Mapping[str, str], entry: str) -> dict[str, Any]:
    """Return what the header says of tensors by their names."""
    try:
        found = json.loads(metadata.get(entry, ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is broken, the entry {entry!r} is no JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ValueError(f"its header is broken, the entry {entry!r} holds {type(found).__name__} instead of names")
    return found


def _state(file: Any, sparse: Mapping[str, Any], tied: Mapping[str, Any], limit: int | None) -> dict[str, Tensor]:
    """Put the tensors of an open file together."""
    stored = set(file.keys())
    codes = {name: (f"{name}.indices", f"{name}.values") for name in sparse}
    parts = {part for both in codes.values() for part in both}
    if missing := sorted(parts - stored):
        raise ValueError(f"it has no {', '.join(missing)}")
    if twice := sorted((stored - parts) & sparse.keys() | (stored | sparse.keys()) & tied.keys()):
        raise ValueError(f"it has {', '.join(twice)} more than once")
    shapes = {name: check_shape(name, shape) for name, shape in sparse.items()}
    tensors = {name: (file.get_tensor(indices), file.get_tensor(values)) for name, (indices, values) in codes.items()}
    sizes = {name: math.prod(max(n, 1) for n in shape) for name, shape in shapes.items()}
    dense = sum(sizes[name] * values.itemsize for name, (_, values) in tensors.items())
    check_bytes(dense, sum(x.nbytes for both in tensors.values() for x in both), limit)
    state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys() if name not in parts}  # noqa: SIM118
    for name, (indices, values) in tensors.items():
        check_positions(indices, shapes[name], f"{name}.indices")
        if values.shape != indices.shape or values.dtype not in _CODED:
            raise ValueError(f"{name}.values are {_describe(values)}, for {len(indices)} indices")
        state[name] = torch.zeros(shapes[name], dtype=values.dtype, device=values.device)
        state[name].view(-1)[indices] = values
    if wrong := [name for name, other in tied.items() if not isinstance(other, str) or other not in state]:
        raise ValueError(f"it ties {', '.join(wrong)} to what it does not have")
    return {**state, **{name: state[other] for name, other in tied.items()}}


def _other(path: str | os.PathLike[str], reason: str) -> str:
    return (
        f"path must be a file of save_sparse, got {os.fspath(path)!r}: {reason.removesuffix('.')}. "
        "A checkpoint is read by lightning_sparse.load_dense."
    )


def _code(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return flat indices and values of what is not zero; None if that takes as much room as the dense tensor."""
    if tensor.dtype not in _CODED:
        return None
    width = _width(tensor.numel())
    flat = tensor.reshape(-1)
    count = int(torch.count_nonzero(flat))
    if count * (width.itemsize + tensor.itemsize) + _ENTRY >= tensor.nbytes:
        return None
    indices = flat.nonzero().flatten()
    return indices.to(width), flat[indices]


def _code_layer(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return flat indices and values of a sparse layer."""
    return flat_positions(crow, col, shape).to(_width(math.prod(shape))), values.detach()


def _width(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 else torch.int64


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
