"""MaskedWeight: a dense parameter, which is exactly 0 outside of a mask."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat.torch_private import finite_each
from lightning_sparse.rules import select, ties
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, row_sums, rows_of, write_matrix
from lightning_sparse.rules.parts import together
from lightning_sparse.weights.base import Weight, all_finite, may_be_alike, new_version, optimizer_state
from lightning_sparse.weights.fresh import SCALES, fresh_value, mean_of_others

__all__ = ["MaskedWeight", "dense", "finite_gradients", "keep_zero_state"]


class MaskedWeight(Weight):
    """A dense parameter, which is exactly 0 outside of a mask.

    Args:
        name: the parameter's name in the LightningModule.
        mask: where it is active; exchanged as a whole, never written in place.
        parameter: the module's parameter; None outside fit.
        buffers: see ``Weight``.
        outputs: see ``Weight``.
        nonempty: see ``Weight``.
    """

    def __init__(
        self,
        name: str,
        mask: Tensor,
        parameter: nn.Parameter | None = None,
        buffers: dict[str, Tensor] | None = None,
        outputs: Outputs = FIRST,
        nonempty: Outputs | None = None,
    ) -> None:
        super().__init__(name, parameter, buffers or {})
        self._mask = mask
        self.outputs, self.nonempty = outputs, nonempty
        self._indices: Tensor | None = None  # flat, in the mask

    @property
    def W(self) -> Tensor:
        """The parameter's values."""
        assert self.parameter is not None
        return self.parameter.data

    @property
    def place(self) -> int:
        """Where these values begin in memory; asking takes no operation of torch."""
        assert self.parameter is not None
        return self.parameter.data_ptr()

    @property
    def dP(self) -> Tensor:
        """The parameter's gradient; before it is masked, it has values at inactive connections, too."""
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return self.parameter.grad

    # ------------------------------------------------------------------ which connections

    @property
    def mask(self) -> Tensor:  # noqa: D102  (inherited)
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask, self._indices, self.mask_version = mask, None, new_version()

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102  (inherited)
        return tuple(self.mask.shape)

    @property
    def num_active(self) -> int:  # noqa: D102  (inherited)
        return select.count(self.mask)

    @property
    def active_indices(self) -> Tensor:
        """Flat positions of the active connections, ascending; on the weight's device. Found once between moves."""
        return self.part.positions(self._active)

    @property
    def _active(self) -> Tensor:
        """Flat indices in the mask of the active connections, ascending."""
        if self._indices is None:
            self._indices = select.positions(self.mask)
        return self._indices

    def hold_indices(self) -> None:
        """Do nothing: they are kept anyway."""

    def forget_indices(self) -> None:  # noqa: D102  (inherited)
        self._indices = None

    # ------------------------------------------------------------------ what they hold

    @property
    def given(self) -> Tensor:  # noqa: D102  (inherited)
        return self.W

    @property
    def finite(self) -> bool:  # noqa: D102  (inherited)
        return all_finite(self.dP)

    @property
    def magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.W.reshape(-1).index_select(0, self._active).abs_()

    @property
    def gradient_magnitudes(self) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1).index_select(0, self._active).abs_()

    @property
    def strays(self) -> int:  # noqa: D102  (inherited)
        return select.count(torch.gt(self.W != 0, self.mask))

    @property
    def alike(self) -> bool:  # noqa: D102  (inherited)
        return may_be_alike(self.W[:8][self.mask[:8]]) and super().alike

    @property
    def gradients_alike(self) -> bool:  # noqa: D102  (inherited)
        return may_be_alike(self.dP[:8][self.mask[:8]]) and super().gradients_alike

    def gradient_at(self, positions: Tensor) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1)[self.part.indices(positions).to(self.dP.device)]

    def sample_inactive(self, stride: int) -> Tensor:  # noqa: D102  (inherited)
        return self.dP.reshape(-1)[::stride].abs()[~self.mask.reshape(-1)[::stride]]

    def gradient_parts(self) -> Iterator[tuple[int, Tensor]]:  # noqa: D102  (inherited)
        yield int(self.part.positions(torch.tensor(0))), self.dP.abs().masked_fill_(self.mask, -1)

    def largest_gradients(self, n: int, at_least: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: D102  (inherited)
        likely = None
        if not at_least:
            likely = select.likely_bound(self.size, n, lambda stride: [self.sample_inactive(stride)])
        found = _inactive_from(self, at_least if likely is None else float(likely))
        if likely is not None and len(found) < n:  # the sample was misleading
            found = _inactive_from(self, at_least)
        gradients = self.dP.reshape(-1)[found].abs()
        if len(found) > n:
            best = select.top_k_positions(gradients, n, order=ties.at(found, self.shape))
            found, gradients = found[best], gradients[best]
        return found.cpu(), gradients.cpu()

    # ------------------------------------------------------------------ how they move

    def start(self, positions: Tensor, generator: Generator) -> None:  # noqa: D102  (inherited)
        mask = torch.zeros_like(self.mask)  # in the parameter's layout
        select.put_(mask, self.part.indices(self.part.here(positions)).to(mask.device), True)
        self.mask = mask

    def scale_to_fan_in_(self) -> None:  # noqa: D102  (inherited)
        rows = as_matrix(self.W, self.outputs)
        step = max(1, select.CHUNK // max(rows.shape[1], 1))  # counts, and products with doubles, copy what they take
        for some, mask in zip(*(torch.split(x, step) for x in (rows, as_matrix(self.mask, self.outputs))), strict=True):
            fan_in = mask.sum(1, keepdim=True).clamp(min=1).double()
            some.mul_((rows.shape[1] / fan_in).sqrt())
        write_matrix(self.W, rows, self.outputs)

    def rewire(self, dropped: Tensor, grown: Tensor, value: float | Tensor = 0.0) -> None:  # noqa: D102  (inherited)
        self.forget_indices()
        if not self.part.any(len(dropped) + len(grown)):
            return
        dropped, grown = (self.part.indices(each).to(self.mask.device) for each in (dropped, grown))
        self.mask = self.mask.clone()
        select.put_(self.mask, dropped, False)
        for key, state in optimizer_state(self):
            select.put_(state, dropped, 0.0)
            select.put_(state, grown, self._fresh(key, state, grown))
        self.forget_indices()  # those that stay
        select.put_(self.mask, grown, True)
        select.put_(self.W, dropped, 0.0)
        select.put_(self.W, grown, value)

    def _fresh(self, key: str, state: Tensor, grown: Tensor) -> float | Tensor:
        """Return what a state of the optimizer is for connections that are about to join the mask."""
        value = fresh_value(self, key)
        if key not in SCALES or not self.part.any(len(grown)):
            return value
        others = state.reshape(-1).index_select(0, self._active)
        rows = rows_of(self.active_indices, self.shape, self.outputs)
        if self.outputs != FIRST:
            rows, order = rows.sort(stable=True)
            others = others[order]
        lengths = torch.bincount(rows, minlength=self.outputs.rows(self.shape))
        sums, lengths, layer = self._of_all(row_sums(others, lengths), lengths)
        of_grown = rows_of(self.part.positions(grown), self.shape, self.outputs)
        return mean_of_others(sums, lengths, of_grown, value, layer).to(state.dtype)

    def _of_all(self, sums: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return sums and lengths of rows, and those of the layer if other processes hold some of its rows."""
        return sums, lengths, None

    def keep(self, mask: Tensor) -> None:  # noqa: D102  (inherited)
        if not self.part.any(select.count(torch.gt(self.mask, mask))):
            return
        self.mask = self.mask.clone().logical_and_(mask)  # in the parameter's layout
        self.keep_zeros()
        keep_zero_state(self)

    def keep_zeros(self) -> None:  # noqa: D102  (inherited)
        select.zero_outside_(self.W, self.mask)

    def keep_zero_gradients(self) -> None:  # noqa: D102  (inherited)
        select.zero_outside_(self.dP, self.mask)

    # ------------------------------------------------------------------ state

    def restore(self, saved: "MaskedWeight") -> None:
        """Have the mask and the buffers of ``saved``, in the parameter's layout and on its device."""
        like = self.mask
        self.mask = torch.empty_like(like).copy_(self.part.cut(saved.mask))
        self.buffers = {
            key: torch.empty_like(like, dtype=buffer.dtype).copy_(self.part.cut(buffer))
            for key, buffer in saved.buffers.items()
        }
        self.keep_zeros()

    def state(self) -> dict[str, Any]:  # noqa: D102  (inherited)
        buffers = {key: self.part.joined(buffer) for key, buffer in self.buffers.items()}
        return {"mask": self.part.joined(self.mask), "buffers": buffers}

    def detach(self) -> None:  # noqa: D102  (inherited)
        self.parameter = self.optimizer = None
        self.mask = self.mask.cpu()
        self.buffers = {key: buffer.cpu() for key, buffer in self.buffers.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_indices": None}


def keep_zero_state(weight: MaskedWeight) -> None:
    """Set to 0 the optimizer's state of what is not active."""
    for _, state in optimizer_state(weight):
        select.zero_outside_(state, weight.mask)


def finite_gradients(weights: Sequence[MaskedWeight]) -> bool:
    """Tell whether all gradients are finite, on all processes: AMP skips a step in which they are not."""
    return together(weights).all(_finite_here(weights))


def _finite_here(weights: Sequence[MaskedWeight]) -> bool:
    gradients = [weight.dP for weight in weights if weight.mask.numel()]
    kinds = {(gradient.device, gradient.dtype) for gradient in gradients}
    if len(kinds) == 1 and gradients[0].is_floating_point():
        return finite_each(gradients)
    return all(all_finite(gradient) for gradient in gradients)


def dense(weights: Sequence[Weight]) -> list[MaskedWeight]:
    """Return weights as what they are where a method needs dense tensors, and so takes no other store than masks."""
    held = [weight for weight in weights if isinstance(weight, MaskedWeight)]
    assert len(held) == len(weights)
    return held


def _inactive_from(weight: MaskedWeight, floor: float) -> Tensor:
    """Return the flat positions of the inactive connections whose ``|dP|`` is ``floor`` or more, ascending."""
    return select.where([weight.dP, weight.mask], lambda dP, mask: torch.gt(dP.abs() >= floor, mask))
