"""DTensors: tensors of which each process holds a part. What this package asks of them stands here."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Layout", "copied", "exchange", "is_sharded", "joined", "layout", "local", "settle_gradient", "whole"]

_PLAIN = (Tensor, nn.Parameter)


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
    def rows_each(self) -> int:
        """Number of rows that each of these processes holds, but the last ones, which may have fewer."""
        return -(-self.shape[0] // self.mesh.size())  # type: ignore[no-any-return]

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

    @property
    def of_rows(self) -> "Layout":
        """Of a vector with one number for each row."""
        return self._replace(shape=self.shape[:1], stride=(1,))

    def everywhere(self, shape: torch.Size) -> "Layout":
        """Of a vector that each of these processes has as a whole."""
        from torch.distributed._tensor.placement_types import Replicate

        return Layout(self.mesh, tuple(Replicate() for _ in self.placements), shape, (1,))


def _dimension(placement: Any) -> int | None:
    """Return the dimension that a placement cuts."""
    return getattr(placement, "dim", None)


def _order(placements: tuple[Any, ...]) -> list[int]:
    """Return the dimensions of a mesh in the order in which they cut: FSDP2 cuts after tensor parallelism."""
    late = [i for i, placement in enumerate(placements) if hasattr(placement, "split_factor")]  # _StridedShard
    return [i for i in range(len(placements)) if i not in late] + late[::-1]


def is_sharded(x: Any) -> bool:
    """Tell whether a tensor is a DTensor; imports nothing: who has made one has imported its module."""
    if type(x) in _PLAIN:  # nearly all are, and each step asks some thirty times
        return False
    module = sys.modules.get("torch.distributed._tensor") or sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def layout(x: Any) -> Layout:
    """Return how a DTensor is divided."""
    return Layout(x.device_mesh, tuple(x.placements), x.shape, x.stride())


def local(x: Any) -> Tensor:
    """Return the part of a DTensor that is here, sharing its memory; of any other tensor itself."""
    part: Tensor = x.detach().to_local() if is_sharded(x) else x
    return part


def exchange(x: Any, memory: Tensor) -> None:
    """Have a tensor use other memory: a DTensor for the part that is here, any other for all of it.

    Relies on ``DTensor._local_tensor``: to assign to ``data`` of a DTensor does nothing. FSDP2 goes on to gather what
    is in the memory from before.
    """
    if is_sharded(x):
        x._local_tensor = memory
    else:
        x.data = memory


def settle_gradient(x: Any) -> None:
    """Divide the gradient of a DTensor as that is divided, if processes still have the terms of a sum (``Partial``).

    So it is where processes run what they all have on parts of a sequence.
    """
    if is_sharded(x) and x.grad.placements != x.placements:
        x.grad = x.grad.redistribute(placements=x.placements)


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
    part, divided = local(x), layout(x)
    numbers = part.to(torch.uint8) if x.dtype == torch.bool else part  # gloo sends no booleans
    gathered: Tensor = joined(numbers.to(divided.mesh.device_type), divided).full_tensor()  # type: ignore[attr-defined]
    return gathered.to(part.device, x.dtype)


def copied(x: Tensor, device: str | torch.device | None = None) -> Tensor:
    """Return a copy of a tensor, of a DTensor of the part that is here; ``device``: where to, else where it is."""
    part = local(x.detach()).to(device).clone()
    if not is_sharded(x):
        return part
    made = joined(part, layout(x))  # on the mesh's device
    exchange(made, part)
    return made
