"""Joined: weights of one optimizer laid end to end, which a method's functions take for one weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat.torch_private import copy_each
from lightning_sparse.kernels.thresholds import FusedKernels
from lightning_sparse.rules.parts import WHOLE
from lightning_sparse.weights.flat import Scratch, in_memory_order, views
from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.thresholds import ThresholdBuffer

__all__ = ["Joined", "can_join"]


def can_join(weight: LatentWeight) -> bool:
    """Tell whether the rows of a weight follow each other in memory, so that it can lie among others."""
    matrix = weight.matrix(weight.latent)
    plain = matrix.data_ptr() == weight.latent.data_ptr() and matrix.is_contiguous()
    alone = weight.part is WHOLE and weight.nonempty is None and weight.frozen is None
    return plain and alone and weight.size > 0


class Joined:
    """Weights laid end to end. What is a matrix of a weight is a vector of all of them.

    Args:
        weights: of one device and dtype; see ``can_join``.
        buffer: their thresholds, and nobody else's; None if the method has none.
        kernels: those of all weights at once; None likewise.

    Attributes:
        weights: the same.
        latent: ``W`` of all; each weight's is a view of it.
        buffers: their boolean tensors by name, likewise, for reading.
        bits: their packed masks by name; each weight's are a view of them.
        trained: their thresholds; None if the method has none.
        kernels: the same.
    """

    frozen = None

    def __init__(
        self, weights: Sequence[LatentWeight], buffer: ThresholdBuffer | None, kernels: FusedKernels | None
    ) -> None:
        self.weights, self._kernels = weights, kernels
        latents = [weight.latent for weight in weights]
        self.latent = torch.cat([in_memory_order(latent) for latent in latents])
        self._latents = views(self.latent, latents)
        self._scratch = Scratch(len(self.latent), self.latent.dtype, self.latent.device)
        self._room = self._scratch.of(len(self.latent))
        self._values = views(self._room, latents)
        self.bits = {key: torch.cat([w.bits[key].reshape(-1) for w in weights]) for key in weights[0].bits}
        self._bits = {key: views(bits, [w.bits[key] for w in weights]) for key, bits in self.bits.items()}
        self.buffers = _Buffers(weights)
        self.trained = None if buffer is None or kernels is None else JoinedThresholds(weights, buffer, kernels)
        self.gather()

    @property
    def thresholds(self) -> "JoinedThresholds":
        """Their thresholds; only methods that train thresholds ask for them."""
        assert self.trained is not None
        return self.trained

    @property
    def kernels(self) -> FusedKernels:
        """What computes with all of them."""
        assert self._kernels is not None
        return self._kernels

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.latent)

    @property
    def has_gradient(self) -> bool:
        """Whether this step has a gradient for each."""
        return all(weight.has_gradient for weight in self.weights)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters."""
        return [weight.parameter for weight in self.weights if weight.parameter is not None]

    def matrix(self, x: Tensor, keep_as: str | None = None) -> Tensor:
        """Return ``x``: a vector, which has the part of a weight's matrix."""
        return x

    def gather(self) -> None:
        """Take back what weights have been given elsewhere."""
        for i, weight in enumerate(self.weights):
            if weight.latent.data_ptr() != self._latents[i].data_ptr():
                weight.latent = self._latents[i].copy_(weight.latent)
            for key, parts in self._bits.items():
                if weight.bits[key].data_ptr() != parts[i].data_ptr():
                    weight.bits[key] = parts[i].copy_(weight.bits[key])

    def turn_gradient(self, gradients: Callable[[Tensor, Tensor], None]) -> None:
        """Make the parameters' gradients those of ``W``, in place; see ``LatentWeight.turn_gradient``."""
        theirs: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
        self.gather()
        with self._scratch:
            copy_each(self._values, theirs)
            gradients(self._room, self.latent)
            copy_each(theirs, self._values)

    def write(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        """Write ``P`` into the parameters; ``make`` writes its second argument, made of the first, ``W``."""
        self.gather()
        with self._scratch:
            make(self.latent, self._room)
            copy_each([*self.parameters], self._values)

    def undo_outside(self, key: str) -> None:
        """Give ``W`` the values that the parameters hold, outside of a boolean buffer."""
        self.gather()
        with self._scratch:
            copy_each(self._values, [*self.parameters])
            torch.where(self.buffers[key], self.latent, self._room, out=self.latent)


class JoinedThresholds:
    """The thresholds of weights that are laid end to end.

    Attributes:
        tau: what ``|W|`` is compared with by the latest ``P``, a vector.
        dtau: where a step's gradients of ``tau`` (and what else the method sums like them) are written, by name: one
            for each row of each weight.
    """

    def __init__(self, weights: Sequence[LatentWeight], buffer: ThresholdBuffer, kernels: FusedKernels) -> None:
        self._buffer = buffer
        t = buffer.values["t"]
        self.tau = t
        rows = [each.rows for each in buffer.thresholds]
        per_row = len(t) == sum(rows)
        self.dtau = {k: dt if per_row else dt.new_zeros(sum(rows)) for k, dt in buffer.gradients.items()}
        self._rows = None if per_row else torch.tensor(rows, device=t.device)
        counts = torch.tensor([each["t"].numel() for each in buffer.thresholds])
        self._weight_of = torch.arange(len(rows)).repeat_interleave(counts).to(t.device)
        self._sizes = [weight.size for weight in weights]
        self._resets = torch.tensor([int(each.resets) for each in buffer.thresholds], device=t.device)
        for each, resets in zip(buffer.thresholds, self._resets, strict=True):
            each.resets = resets
        self._limits: dict[float, Tensor] = {}

    @property
    def shrinkage(self) -> float:
        """By how much of ``tau`` weights above it shrink: those of an optimizer follow one plan."""
        return self._buffer.thresholds[0].shrinkage

    def per_row(self, key: str = "t") -> Tensor:
        """Return the thresholds of a name: a vector."""
        return self._buffer.values[key]

    def set_levels(self, level: Callable[[Tensor], Tensor]) -> None:
        """Set ``tau``, for ``P`` to be made of."""
        self.tau = level(self.per_row())

    def fold(self) -> None:
        """Add ``dtau`` up to the shape of the thresholds."""
        for key, dtau in self.dtau.items():
            if self._rows is not None:
                sums = torch.segment_reduce(dtau, "sum", lengths=self._rows)  # in one order, also on GPUs
                self._buffer.gradients[key].copy_(sums)

    def reset_collapsed(self, passing: Tensor, bound: float) -> None:
        """Set the forward thresholds of weights to 0 of which more than the share ``bound`` is masked."""
        if bound not in self._limits:
            limits = [_most_passing(size, bound) for size in self._sizes]
            self._limits[bound] = torch.tensor(limits, device=passing.device)
        collapsed = passing <= self._limits[bound]
        self._resets.add_(collapsed)
        self._buffer.values["t"].masked_fill_(collapsed[self._weight_of], 0)


class _Buffers:
    """Boolean tensors of several weights, laid end to end when they have been exchanged."""

    def __init__(self, weights: Sequence[LatentWeight]) -> None:
        self._weights = weights
        self._laid: dict[str, tuple[list[Tensor], Tensor]] = {}

    def __getitem__(self, key: str) -> Tensor:
        theirs = [weight.buffers[key] for weight in self._weights]
        held = self._laid.get(key)
        if held is None or any(x is not y for x, y in zip(held[0], theirs, strict=True)):
            held = self._laid[key] = theirs, torch.cat([in_memory_order(x) for x in theirs])
        return held[1]


def _most_passing(size: int, bound: float) -> int:
    """Return the largest number of weights that pass where more than the share ``bound`` is masked, -1 if none.

    >>> _most_passing(1000, 0.99), _most_passing(10, 1.0)
    (9, -1)
    """
    passing = min(size, int(size * (1 - bound)) + 2)
    while passing >= 0 and not (size - passing) / size > bound:
        passing -= 1
    return passing
