"""ShardedWeight: a part of a masked weight, whose other parts are on other processes (FSDP2, tensor parallelism)."""

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat.shards import layout, local
from lightning_sparse.rules import select
from lightning_sparse.rules.matrices import FIRST, Outputs, rows_of
from lightning_sparse.rules.parts import Shard
from lightning_sparse.weights.base import all_finite
from lightning_sparse.weights.fresh import whole_layer
from lightning_sparse.weights.masked import MaskedWeight

__all__ = ["ShardedWeight"]


class ShardedWeight(MaskedWeight):
    """A part of a dense parameter, which is exactly 0 outside of a mask: what a process holds of a DTensor.

    Here the DTensor ends: mask, buffers, values and gradients are plain tensors of the rows or columns that are here.

    Args:
        name: the parameter's name in the LightningModule.
        parameter: the module's parameter, a DTensor; see ``rules.parts.Shard`` for how it may be divided.
        outputs: see ``Weight``.
    """

    part: Shard

    def __init__(self, name: str, parameter: nn.Parameter, outputs: Outputs = FIRST) -> None:
        here = local(parameter)
        super().__init__(name, torch.ones_like(here, dtype=torch.bool), parameter, outputs=outputs)
        self.part = Shard(layout(parameter), here.device)
        self._num_active = self.size

    @property
    def W(self) -> Tensor:  # noqa: D102  (inherited)
        return local(self.parameter)

    @property
    def place(self) -> int:  # noqa: D102  (inherited)
        return self.W.data_ptr()

    @property
    def dP(self) -> Tensor:  # noqa: D102  (inherited)
        assert self.parameter is not None
        return local(self.parameter.grad)

    # ------------------------------------------------------------------ which connections

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return self.part.shape

    @property
    def num_active(self) -> int:  # noqa: D102  (inherited)
        return self._num_active

    def _count(self) -> None:
        """Add up the active connections of all processes."""
        (self._num_active,) = self.part.total(select.count(self.mask))

    # ------------------------------------------------------------------ what they hold

    @property
    def finite(self) -> bool:  # noqa: D102  (inherited)
        return self.part.all(super().finite)

    @property
    def diverged(self) -> bool:  # noqa: D102  (inherited)
        return self.parameter is not None and not self.part.all(all_finite(self.W))

    @property
    def alike(self) -> bool:  # noqa: D102  (inherited)
        return self.part.all_equal(self.magnitudes)

    @property
    def gradients_alike(self) -> bool:  # noqa: D102  (inherited)
        return self.part.all_equal(self.gradient_magnitudes)

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        gradients = self.dP.reshape(-1).abs()
        candidates = torch.gt(gradients >= at_least, self.mask.reshape(-1))
        n = min(n, self.num_inactive if not at_least else self.part.total(select.count(candidates))[0])
        found = self.part.top_k_positions(gradients, n, candidates)
        return self.part.positions(found).cpu(), gradients[found].cpu()

    # ------------------------------------------------------------------ how they move

    def start(self, positions: Tensor, generator: Generator) -> None:  # noqa: D102  (inherited)
        super().start(positions, generator)
        self._count()

    def scale_to_fan_in_(self) -> None:  # noqa: D102  (inherited)
        rows = rows_of(self.active_indices, self.shape, self.outputs)
        number = self.outputs.rows(self.shape)
        fan_in = torch.bincount(rows, minlength=number)
        if not self._rows_are_whole:
            fan_in = self.part.sums(fan_in)
        factors = (self.size // number / fan_in.clamp(min=1).double()).sqrt()
        values = self.W.reshape(-1)[self._active].mul_(factors[rows])
        select.put_(self.W, self._active, values)

    def rewire(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:  # noqa: D102  (inherited)
        super().rewire(dropped, grown, value)
        self._count()

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        super().keep(mask)
        self._count()

    @property
    def _rows_are_whole(self) -> bool:
        """No row of a matrix ``(out, in)`` lies on several processes."""
        return self.part.divided <= ({0, self.outputs.axis} if self.outputs.stacked else {self.outputs.axis})

    def _of_all(self, sums: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        if not self._rows_are_whole:
            return self.part.sums(sums), self.part.sums(lengths), None
        return sums, lengths, whole_layer(self.part, sums, lengths)

    # ------------------------------------------------------------------ state

    def restore(self, saved: MaskedWeight) -> None:
        """Have the mask and the buffers of ``saved``: the same part of them, if it has all."""
        if isinstance(saved, ShardedWeight):
            self.mask = torch.empty_like(self.mask).copy_(saved.mask)
            self.buffers = {key: buffer.to(self.mask.device) for key, buffer in saved.buffers.items()}
            self.keep_zeros()
        else:
            super().restore(saved)
        self._count()
