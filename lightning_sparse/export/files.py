"""Files whose size is in proportion to the weights that are not zero, in the safetensors format."""

import json
import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.kernels.structure import flat_positions
from lightning_sparse.storage.checkpoint import take_sparse

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
            names collide.

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
    state = dict(state.state_dict() if isinstance(state, nn.Module) else state)
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


def load_sparse(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the plain state dict that ``save_sparse`` wrote; tied tensors are one tensor again.

    Args:
        path: of the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ``save_sparse``.

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
    checks.file("Give one that save_sparse has written.", path=path)
    try:
        opened = safetensors.safe_open(os.fspath(path), framework="pt", device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(_other(path, f"it is not a safetensors file ({error})")) from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(_other(path, f"its format is {metadata.get('format')!r}"))
        shapes: dict[str, list[int]] = json.loads(metadata["sparse"])
        parts = {f"{name}.{part}" for name in shapes for part in ("indices", "values")}
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys() if name not in parts}  # noqa: SIM118
        for name, shape in shapes.items():
            values = file.get_tensor(f"{name}.values")
            tensor = torch.zeros(shape, dtype=values.dtype, device=values.device)
            tensor.view(-1)[file.get_tensor(f"{name}.indices")] = values
            state[name] = tensor
    state.update({name: state[other] for name, other in json.loads(metadata["tied"]).items()})
    return state


def _other(path: str | os.PathLike[str], reason: str) -> str:
    return (
        f"path must be a file of save_sparse, got {os.fspath(path)!r}: {reason}. "
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
    return f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
