"""How masks look and how they change: empty units, pictures, churn, exploration."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.kernels.bits import pack, unpack
from lightning_sparse.rules.parts import WHOLE, Together, Whole

__all__ = [
    "Explored",
    "bits_of_part",
    "cells",
    "churn",
    "edges",
    "empty_inputs",
    "empty_neurons",
    "mask_bits",
    "saved_bits",
    "shrunk_size",
    "spread",
]


def empty_neurons(mask: Tensor) -> int:
    """Return how many outputs (neurons, filters) of a layer have no weight left.

    Args:
        mask: where the weight is active, ``(out, in, ...)``.

    >>> empty_neurons(torch.tensor([[True, False, True], [False, False, False]]))
    1
    """
    return int((~mask.flatten(1).any(1)).sum())


def empty_inputs(mask: Tensor, groups: int = 1) -> int:
    """Return how many inputs (features, channels) of a layer no weight reads.

    Args:
        mask: where the weight is active, ``(out, in / groups, ...)``.
        groups: of a convolution.

    >>> empty_inputs(torch.tensor([[True, False, True], [False, False, False]]))
    1
    """
    return int((~mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3).any(1)).sum())


def shrunk_size(mask: Tensor, groups: int = 1) -> int:
    """Return the size of a layer's dense weight without its empty outputs and inputs (GGR, Table 4).

    Args:
        mask: where the weight is active, ``(out, in / groups, ...)``, or of a transposed convolution the converse.
        groups: of a convolution; each loses its own.

    >>> shrunk_size(torch.tensor([[True, False, True], [False, False, False]]))
    2
    """
    touched = mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3)
    return int((touched.any(2).sum(1) * touched.any(1).sum(1)).sum()) * math.prod(mask.shape[2:])


# ---------------------------------------------------------------------- how masks look


def cells(matrix: Tensor, most: int = 128) -> Tensor:
    """Return a picture of a mask: its density in each cell of a grid, on the CPU.

    Args:
        matrix: boolean, ``(out, n)``.
        most: the grid has at most so many rows and columns; smaller matrices have a cell an element.

    >>> cells(torch.tensor([[True, False, True, True], [False, False, False, True]]), most=2)
    tensor([[0.5000, 1.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    rows, columns = (edges(size, most) for size in matrix.shape)
    band = max(1, (1 << 20) // matrix.shape[1])  # rows at once: numbers take four times the memory of the mask
    by_column = torch.cat([_sums(part, columns, dim=1) for part in torch.split(matrix, band)])
    counts = _sums(by_column, rows, dim=0).double().cpu()
    area = torch.tensor(rows).diff().unsqueeze(1) * torch.tensor(columns).diff()
    return counts / area


def _sums(x: Tensor, between: list[int], dim: int) -> Tensor:
    """Return the sums of ``x`` between each two of some edges along ``dim``."""
    ends = torch.tensor(between[1:], device=x.device) - 1
    sums = x.cumsum(dim, dtype=torch.int32).index_select(dim, ends)
    return sums.diff(dim=dim, prepend=torch.zeros_like(sums.narrow(dim, 0, 1)))


def edges(size: int, most: int = 128) -> list[int]:
    """Divide ``size`` into at most ``most`` nearly equal parts: where these begin, and the end."""
    count = min(size, most)
    return [index * size // count for index in range(count + 1)]


def spread(values: Tensor, bins: int = 20, part: Whole = WHOLE) -> dict[str, Any]:
    """Return minimum, mean, maximum and a histogram of some numbers: ``counts`` between ``edges``.

    Args:
        values: the numbers, or the part of them that is here.
        bins: of the histogram.
        part: adds up what all parts have.

    >>> spread(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=2)
    {'min': 0.0, 'mean': 1.5, 'max': 4.0, 'counts': [3, 1], 'edges': [0.0, 2.0, 4.0]}
    """
    values = values.detach().reshape(-1).double().cpu()
    low, high = part.extremes(values)
    bins = bins if low < high else 1
    sums = part.sums(torch.cat([values.sum().view(1), torch.histc(values, bins, low, high)]))
    total, counts = float(sums[0]), [int(n) for n in sums[1:].tolist()]
    between = [low + (high - low) * index / bins for index in range(bins + 1)]
    return {"min": low, "mean": total / sum(counts), "max": high, "counts": counts, "edges": between}


# ---------------------------------------------------------------------- how masks change


def mask_bits(mask: Tensor) -> Tensor:
    """Return a mask as bits in the order of its elements, on the CPU: uint8, ``(ceil(size / 8),)``."""
    return pack(mask.reshape(1, mask.numel())).squeeze(0).cpu()


def _ones(bits: Tensor) -> int:
    """Return the number of ones among bits."""
    return int(torch.bincount(bits, minlength=256) @ torch.tensor([byte.bit_count() for byte in range(256)]))


def bits_of_part(saved: Tensor, part: Whole, shape: Sequence[int]) -> Tensor:
    """Return the bits of a part of a weight of this ``shape``, from what a checkpoint has; on the CPU.

    Args:
        saved: bits or mask of the whole weight, or its mask divided as the part is.
        part: which.
        shape: of the weight.
    """
    if saved.dtype == torch.bool:
        return mask_bits(part.cut(saved))
    if part is WHOLE:
        return saved.cpu()
    return mask_bits(part.cut(unpack(saved.view(1, -1), math.prod(shape)).view(*shape)))


def saved_bits(bits: Tensor, part: Whole, shape: Sequence[int]) -> Tensor:
    """Return what a checkpoint has of the bits of a part: of a whole weight themselves, else the mask as a DTensor."""
    if part is WHOLE:
        return bits
    here = part.shape_here(shape)
    return part.joined(unpack(bits.view(1, -1), math.prod(here)).view(here))


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor], parts: Together = WHOLE) -> float:
    """Return how far masks have changed: the share of connections that are in one of two, not both.

    ``|A xor B| / (|A| + |B|)`` over all weights: 0 for equal masks, 1 for disjoint ones, and with a fixed budget the
    share of connections that were exchanged.

    Args:
        before: bits by name, from ``mask_bits``.
        after: the same later.
        parts: adds up what all parts of these weights have.

    >>> before, after = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    >>> churn({"weight": mask_bits(before)}, {"weight": mask_bits(after)})
    0.5
    """
    different = sum(parts.total(*(_ones(before[name] ^ bits) for name, bits in after.items())))
    both = sum(parts.total(*(_ones(before[name]) + _ones(bits) for name, bits in after.items())))
    return different / both if both else 0.0


@dataclass
class Explored:
    """Which connections have been active at any time, a bit each; their share is ITOP's exploration rate R_s.

    >>> explored = Explored()
    >>> for mask in ([True, False, False, False], [False, True, False, False]):
    ...     _ = explored.add("weight", torch.tensor(mask))
    >>> explored.rate(["weight"])
    0.5
    """

    bits: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, positions: Tensor, size: int) -> None:
        """Begin anew: of the ``size`` connections of the weight ``name``, those at flat ``positions`` are active."""
        self.bits[name], self.sizes[name] = torch.zeros((size + 7) // 8, dtype=torch.uint8), size
        self.mark(name, positions)

    def mark(self, name: str, positions: Tensor) -> None:
        """See more active connections of the weight ``name``, by their flat positions, all different."""
        bits, byte, place = self.bits[name], positions >> 3, positions & 7
        new = bits[byte] >> place & 1 == 0
        self.bits[name] = bits.index_add(0, byte[new], (1 << place[new]).to(torch.uint8))  # a sum of different bits

    def add(self, name: str, mask: Tensor) -> Tensor:
        """See a mask of the weight ``name``, and return its bits."""
        bits = mask_bits(mask)
        self.bits[name] = self.bits[name] | bits if name in self.bits else bits
        self.sizes[name] = mask.numel()
        return bits

    def keep(self, names: Collection[str]) -> None:
        """Forget all weights but ``names``."""
        self.bits = {name: bits for name, bits in self.bits.items() if name in names}
        self.sizes = {name: size for name, size in self.sizes.items() if name in names}

    def rate(self, names: Collection[str], parts: Together = WHOLE) -> float:
        """Return the share of the weights ``names`` that have been active at any time; ``parts``: of these weights."""
        explored = sum(parts.total(*(_ones(self.bits[name]) for name in names)))
        return explored / sum(parts.total(*(self.sizes[name] for name in names)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"bits": dict(self.bits), "sizes": dict(self.sizes)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self.bits, self.sizes = dict(state_dict["bits"]), dict(state_dict["sizes"])
