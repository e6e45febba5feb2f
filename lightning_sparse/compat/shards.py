"""DTensors: tensors of which each process holds a part. What this package asks of them stands here."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "is_sharded", "joined", "layout", "local", "whole"]


class Layout(NamedTuple):
    """How a tensor is divided over processes.

    Attributes:
        mesh: the ``DeviceMesh`` of the processes.
        placements: what each of its dimensions does: shard, replicate.
        shape: of the whole tensor.
        stride: of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def by_rows(self) -> bool:
        """The processes of a mesh of one dimension hold some rows each, one after the other."""
        return len(self.placements) == 1 and _dimension(self.placements[0]) == 0

    @property
    def is_known(self) -> bool:
        """Each dimension of the mesh cuts one of the tensor into parts, or does nothing."""
        return all(_dimension(placement) is not None or placement.is_replicate() for placement in self.placements)

    @property
    def ranges(self) -> tuple[range, ...]:
        """What this process holds of each dimension of the tensor, which must be known."""
        held = [range(n) for n in self.shape]
        for i in _order(self.placements):
            dim = _dimension(self.placements[i])
            if dim is not None:
                length = -(-len(held[dim]) // self.mesh.size(i))  # of all but the last parts, as torch.chunk divides
                first = self.mesh.get_local_rank(i) * length
                held[dim] = held[dim][first : first + length]
        return tuple(each if len(each) else range(0) for each in held)


def _dimension(placement: Any) -> int | None:
    """Return the dimension that a placement cuts."""
    return getattr(placement, "dim", None)


def _order(placements: tuple[Any, ...]) -> list[int]:
    """Return the dimensions of a mesh in the order in which they cut: FSDP2 cuts after tensor parallelism."""
    late = [i for i, placement in enumerate(placements) if hasattr(placement, "split_factor")]  # _StridedShard
    return [i for i in range(len(placements)) if i not in late] + late[::-1]


def is_sharded(x: Any) -> bool:
    """Tell whether a tensor is a DTensor; imports nothing: who has made one has imported its module."""
    module = sys.modules.get("torch.distributed._tensor") or sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def layout(x: Any) -> Layout:
    """Return how a DTensor is divided."""
    return Layout(x.device_mesh, tuple(x.placements), x.shape, x.stride())


def local(x: Any) -> Tensor:
    """Return the part of a DTensor that is here, sharing its memory; of any other tensor itself."""
    part: Tensor = x.detach().to_local() if is_sharded(x) else x
    return part


def joined(part: Tensor, like: Layout) -> Tensor:
    """Return the DTensor of which ``part`` is here; asks no other process."""
    from torch.distributed._tensor.api import DTensor

    made: Tensor = DTensor.from_local(  # type: ignore[no-untyped-call]
        part, like.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride
    )
    return made


def whole(x: Any) -> Tensor:
    """Return all of a DTensor, which all processes ask for together; of any other tensor itself."""
    if not is_sharded(x):
        return x  # type: ignore[no-any-return]
    bits: Any = (
        joined(x.to_local().to(torch.uint8), layout(x)) if x.dtype == torch.bool else x
    )  # gloo sends no booleans
    gathered: Tensor = bits.full_tensor()
    return gathered.to(x.dtype)
