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
from lightning_sparse.export.gaps import gap_bytes, gaps, gaps_to_positions
from lightning_sparse.kernels.structure import check_positions, flat_positions
from lightning_sparse.storage.checkpoint import check_bytes, check_limit, check_shape, take_sparse

__all__ = ["load_sparse", "save_sparse"]

_FORMAT = "lightning_sparse 2"
# what earlier versions of the package have written: indices only
_FORMATS = "lightning_sparse 1", _FORMAT
# how the places of nonzeros are written
_FORMS = "gaps", "indices"
# what the header of a file takes up for one more tensor, about
_ENTRY = 200
_CODED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def save_sparse(state: Mapping[str, Tensor] | nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a state dict so that zeros take no room.

    A tensor with enough zeros is written as ``NAME.values`` and ``NAME.gaps``: one byte for the zeros before each
    nonzero, and one more for every 255 of them. If fewer than about one element in 900 is nonzero, flat indices are
    smaller than gaps; then it is written as ``NAME.values`` and ``NAME.indices``, int32 (int64 from 2**31 elements).
    Any other tensor is written as it is. The nonzeros of sparse layers are written as those of the plain module's
    ``weight``, without making it. Tied tensors are written once. The file is safetensors, with what is needed to put
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
        >>> os.path.getsize(path) < 6000  # 5 bytes a nonzero; dense: 4,000,000
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
    forms: dict[str, str] = {}
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
            forms[name], places, values = coded
            new = {f"{name}.{forms[name]}": places.cpu(), f"{name}.values": values.cpu()}
            sparse[name] = list(shape)
        if parts.keys() & new.keys():
            raise ValueError(f"names in state must not collide, but {name!r} is written as {sorted(new)}. Rename it.")
        parts.update(new)
    entries = {"sparse": sparse, "forms": forms, "tied": tied}
    metadata = {"format": _FORMAT, **{entry: json.dumps(found) for entry, found in entries.items()}}
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
        if metadata.get("format") not in _FORMATS:
            raise ValueError(_other(path, f"its format is {metadata.get('format')!r}"))
        try:
            sparse, tied = _names(metadata, "sparse"), _names(metadata, "tied")
            forms = _names(metadata, "forms") if metadata["format"] == _FORMAT else dict.fromkeys(sparse, "indices")
            return _state(file, sparse, forms, tied, limit)
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


def _state(
    file: Any, sparse: Mapping[str, Any], forms: Mapping[str, Any], tied: Mapping[str, Any], limit: int | None
) -> dict[str, Tensor]:
    """Put the tensors of an open file together."""
    stored = set(file.keys())
    if forms.keys() != sparse.keys() or not all(form in _FORMS for form in forms.values()):
        raise ValueError(f"its header is broken, the entry 'forms' has to give each of {len(sparse)} tensors a form")
    codes = {name: (f"{name}.{form}", f"{name}.values") for name, form in forms.items()}
    parts = {part for both in codes.values() for part in both}
    if missing := sorted(parts - stored):
        raise ValueError(f"it has no {', '.join(missing)}")
    if twice := sorted((stored - parts) & sparse.keys() | (stored | sparse.keys()) & tied.keys()):
        raise ValueError(f"it has {', '.join(twice)} more than once")
    shapes = {name: check_shape(name, shape) for name, shape in sparse.items()}
    tensors = {name: (file.get_tensor(places), file.get_tensor(values)) for name, (places, values) in codes.items()}
    sizes = {name: math.prod(max(n, 1) for n in shape) for name, shape in shapes.items()}
    dense = sum(sizes[name] * values.itemsize for name, (_, values) in tensors.items())
    check_bytes(dense, sum(x.nbytes for both in tensors.values() for x in both), limit)
    state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys() if name not in parts}  # noqa: SIM118
    for name, (places, values) in tensors.items():
        state[name] = _tensor(name, forms[name], places, values, shapes[name])
    if wrong := [name for name, other in tied.items() if not isinstance(other, str) or other not in state]:
        raise ValueError(f"it ties {', '.join(wrong)} to what it does not have")
    return {**state, **{name: state[other] for name, other in tied.items()}}


def _tensor(name: str, form: str, places: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this shape that is 0 but at the ``places``, which are written in this form."""
    if form == "gaps":
        positions = gaps_to_positions(places, math.prod(shape))
    else:
        check_positions(places, shape, f"{name}.indices")
        positions = places.long()
    if values.shape != positions.shape or values.dtype not in _CODED:
        raise ValueError(f"{name}.values are {_describe(values)}, for {len(positions)} {form}")
    tensor = torch.zeros(shape, dtype=values.dtype, device=values.device)
    tensor.view(-1).scatter_(0, positions, values)
    return tensor


def _other(path: str | os.PathLike[str], reason: str) -> str:
    return (
        f"path must be a file of save_sparse, got {os.fspath(path)!r}: {reason.removesuffix('.')}. "
        "A checkpoint is read by lightning_sparse.load_dense."
    )


def _code(tensor: Tensor) -> tuple[str, Tensor, Tensor] | None:
    """Return form, places and values of what is not zero; None if that takes as much room as the dense tensor."""
    if tensor.dtype not in _CODED:
        return None
    flat = tensor.reshape(-1)
    count = int(torch.count_nonzero(flat))
    if count * (1 + tensor.itemsize) + _ENTRY >= tensor.nbytes:
        return None
    positions = flat.nonzero().flatten()
    form, places = _places(positions, tensor.numel())
    return form, places, flat[positions]


def _code_layer(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> tuple[str, Tensor, Tensor]:
    """Return form, places and values of a sparse layer's nonzeros."""
    return *_places(flat_positions(crow, col, shape), math.prod(shape)), values.detach()


def _places(positions: Tensor, size: int) -> tuple[str, Tensor]:
    """Return the form in which these positions take the least room, and the positions in this form."""
    width = _width(size)
    if gap_bytes(positions) <= len(positions) * width.itemsize:
        return "gaps", gaps(positions)
    return "indices", positions.to(width)


def _width(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 else torch.int64


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
