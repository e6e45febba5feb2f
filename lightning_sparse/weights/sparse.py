"""SparseWeight: one weight of a truly sparse layer while it is trained."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat.heap import trim_heap
from lightning_sparse.kernels.positions import taken
from lightning_sparse.layers.sparse import SparseLayer, make_sparse_
from lightning_sparse.rules import select
from lightning_sparse.rules.ascending import contains
from lightning_sparse.rules.matrices import row_sums, rows_of
from lightning_sparse.weights.base import Weight, all_finite, elementwise, may_be_alike, new_version, optimizer_states
from lightning_sparse.weights.captured import CapturedGradient
from lightning_sparse.weights.fresh import SCALES, fresh_value, mean_of_others

__all__ = ["SparseWeight", "trim_after"]

_TRIMMED_FROM = 1 << 18  # nonzeros of a layer, for whose indices it pays to give freed memory back
_SPARED = 48  # bytes for each nonzero, twice what it takes itself, that may be left between the layers of an update


class SparseWeight(Weight):
    """One weight of which the active connections alone exist; ``parameter`` is the vector of their values.

    Args:
        name: of the dense weight in the LightningModule.
        shape: its shape.
        layer: the layer that holds it, which ``start`` makes sparse; None outside fit.
    """

    def __init__(self, name: str, shape: Sequence[int], layer: nn.Module | None = None) -> None:
        super().__init__(name, layer.values if isinstance(layer, SparseLayer) else None, {})
        self.layer = layer
        if isinstance(layer, SparseLayer):
            layer.full_name = name
        self.gradient = CapturedGradient()
        self._drawn = False
        self._shape = tuple(shape)
        self._indices: Tensor | None = None  # between fits
        self._held: Tensor | None = None  # the layer's, from hold_indices to forget_indices
        self._holds = False

    @property
    def values(self) -> Tensor:
        """The values of the active connections, in the order of their positions."""
        assert self.parameter is not None
        return self.parameter.data

    @property
    def sparse(self) -> SparseLayer:
        """The layer that holds the values."""
        assert isinstance(self.layer, SparseLayer)
        return self.layer

    @property
    def known(self) -> bool:
        """The connections are known: from the layer, or from an earlier fit in this process."""
        return self.layer is not None or self._indices is not None

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self._shape

    @property
    def num_active(self) -> int:  # noqa: D102  (inherited)
        return len(self.active_indices) if self.layer is None else self.sparse.nnz

    @property
    def active_indices(self) -> Tensor:  # noqa: D102  (inherited)
        if self.layer is not None:
            found = self.sparse.positions if self._held is None else self._held
            self._held = found if self._holds else None
            return found
        if self._indices is None:
            raise RuntimeError(f"The connections of {self.name} are in the module's part of the checkpoint.")
        return self._indices

    def hold_indices(self) -> None:  # noqa: D102  (inherited)
        self._holds = True

    def forget_indices(self) -> None:
        """Let go of them: the layer can tell them again."""
        self._holds, self._held = False, None

    @property
    def mask(self) -> Tensor:
        """Where the weight is active, of the dense shape: made when asked for, for users alone."""
        marks = torch.zeros(self.size, dtype=torch.bool)
        marks[self.active_indices.cpu()] = True
        return marks.view(self.shape)

    @property
    def given(self) -> Tensor:  # noqa: D102  (inherited)
        assert isinstance(self.layer, (nn.Linear, nn.Conv2d))
        assert not isinstance(self.layer, SparseLayer)
        return self.layer.weight.detach()

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.values.abs()

    @property
    def gradient_magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return self.parameter.grad.abs()

    @property
    def finite(self) -> bool:
        """All gradients are finite, also those of connections that do not exist, for a bound on them is."""
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return all_finite(self.parameter.grad) and self.gradient.finite(self.sparse)

    @property
    def alike(self) -> bool:  # noqa: D102  (inherited)
        return may_be_alike(self.values[:8]) and super().alike

    @property
    def gradients_alike(self) -> bool:  # noqa: D102  (inherited)
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return may_be_alike(self.parameter.grad[:8]) and super().gradients_alike

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return gradients of connections that need not exist, by ascending position, averaged over processes."""
        return self.gradient.at(self.sparse, positions)

    def sample_inactive(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        every = torch.arange(0, self.size, stride)
        every = every[~contains(self.active_indices.cpu(), every)]
        return self.gradient_at(every).abs()

    def gradient_parts(self) -> Iterator[tuple[int, Tensor]]:  # noqa: D102  (inherited)
        for first, gradients in self.gradient.inactive(self.sparse, self.active_indices):
            yield first, gradients.view(-1, *self.shape[1:])

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        likely = None
        if not at_least:
            likely = select.likely_bound(self.size, n, lambda stride: [self.sample_inactive(stride)])
        if likely is not None:
            found = self._largest(n, float(likely))
            if len(found[0]) == n:
                return found
        return self._largest(n, at_least)  # or it was misleading

    def _largest(self, n: int, at_least: float) -> tuple[Tensor, Tensor]:
        candidates = self.gradient.candidates(self.sparse, self.active_indices)
        return select.largest_of(candidates, n, self.shape, at_least)

    def start(self, positions: Tensor, generator: Generator) -> None:
        """Make the layer sparse, with its own values at ``positions``; one on the meta device has them drawn."""
        self._drawn = self.given.is_meta
        self.layer = layer = self._made_sparse(positions, generator)
        layer.full_name = self.name
        self.parameter, self.mask_version = layer.values, new_version()
        trim_after(self)

    def _made_sparse(self, positions: Tensor, generator: Generator) -> SparseLayer:
        """Return the layer, made sparse in place."""
        assert isinstance(self.layer, (nn.Linear, nn.Conv2d))
        return make_sparse_(self.layer, positions, generator)

    def scale_to_fan_in_(self) -> None:
        """Do as ``Weight.scale_to_fan_in_``, unless the values have been drawn for the actual fan-in."""
        if not self._drawn:
            fan_in = self.sparse.structure.row_lengths
            factors = (math.prod(self.shape[1:]) / fan_in.clamp(min=1).double()).sqrt()
            step = max(1, select.CHUNK * len(fan_in) // max(self.num_active, 1))  # a product with double is a copy
            lengths = torch.split(fan_in, step)
            parts = torch.split(self.values, [int(each.sum()) for each in lengths])
            for values, some, length in zip(parts, torch.split(factors, step), lengths, strict=True):
                values.mul_(some.repeat_interleave(length))

    def rewire(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:
        """Move connections, as ``Weight.rewire``; values, gradients and optimizer state change their places."""
        if not (len(dropped) or len(grown)):
            self.forget_indices()
            return
        assert self.parameter is not None
        fresh, old = self.values.new_zeros(len(grown)), self.parameter.grad
        grown, new = grown.cpu(), fresh + value
        if (grown[1:] < grown[:-1]).any():  # seldom, and sorting takes long
            grown, order = grown.sort()
            new = new[order.to(new.device)]
        trim_after(self, spare=_SPARED * self.num_active)
        self.forget_indices()
        found, source = self.sparse.structure_moved(dropped.cpu(), grown)

        def rearranged(x: Tensor, new: Tensor) -> Tensor:
            return taken(x, new.to(x), source)

        gradient = None
        if old is not None:
            gradient = rearranged(old, self.gradient_at(grown))
            gradient = old.copy_(gradient) if len(old) == len(gradient) else gradient
        values = rearranged(self.values, new)
        for kept in optimizer_states(self):
            for key, state in elementwise(kept, self):
                new = fresh + fresh_value(self, key)
                if key in SCALES and len(grown):
                    rows, lengths = rows_of(grown, self.shape).to(fresh.device), found.row_lengths
                    others = lengths - torch.bincount(rows, minlength=len(lengths))
                    sums = row_sums(rearranged(state, fresh), lengths)
                    new = mean_of_others(sums, others, rows, fresh_value(self, key))
                kept[key] = rearranged(state, new)
        self.sparse.set_structure(found, values)
        self.mask_version = new_version()
        self.parameter.grad = gradient

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        indices = self.active_indices
        staying = mask.reshape(-1)[indices.to(mask.device)]
        self.rewire(indices.cpu()[~staying.cpu()], indices[:0].cpu())

    def keep_zeros(self) -> None:
        """Do nothing: what is not active does not exist."""

    def keep_zero_gradients(self) -> None:
        """Do nothing: what is not active has no gradient."""

    def detach(self) -> None:  # noqa: D102  (inherited)
        if isinstance(self.layer, SparseLayer):
            self._indices = self.active_indices.cpu()
        self.layer = self.parameter = self.optimizer = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the module's part, which has the connections."""
        return {"shape": torch.tensor(self.shape)}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module."""
        indices = self._indices if self.layer is None else self.active_indices.cpu()
        return {**super().__getstate__(), "layer": None, "_indices": indices, "_held": None}


def trim_after(*weights: Weight, spare: int = 0) -> None:
    """Give freed memory back if there can be much, and more than ``spare`` bytes."""
    if any(weight.num_active >= _TRIMMED_FROM and _on_cpu(weight) for weight in weights):
        trim_heap(spare)


def _on_cpu(weight: Weight) -> bool:
    return weight.parameter is not None and weight.parameter.is_cpu
