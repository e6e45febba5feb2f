"""What LatentCallback keeps of each weight, and of all weights of an optimizer together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.kernels.bits import pack, unpack
from lightning_sparse.kernels.thresholds import ThresholdKernels, for_tensors
from lightning_sparse.rules.matrices import as_matrix, write_matrix

__all__ = ["LatentWeight", "Pool", "pools"]


@dataclass(eq=False)
class LatentWeight:
    """One weight that trains sparse.

    Attributes:
        name: the parameter's name in the LightningModule.
        latent: ``W``, of the parameter's shape.
        thresholds: trainable thresholds by name; ``"t"`` is the forward one. Of shape ``(out,)``, ``(1,)`` or the
            parameter's, after the granularity. Empty if the method has none.
        buffers: further tensors of the parameter's shape that belong to the method's state.
        bits: boolean ones among them, packed; see ``mask``.
        transposed_groups: see ``layers.selection.ParameterChoice``.
        places: where each threshold stands in the param group of its weight, by which a checkpoint knows its state.
        parameter: the module's parameter; None outside fit.
        effective: the storage of ``P`` while the parameter holds ``W``; else None.
        resets: how often the collapse guard set the thresholds to 0.
        tau: what ``|W|`` is compared with by the latest ``P``, ``(out, 1)`` or ``(out, n)``.
        dtau: where a step's gradients of ``tau`` (and what else the method sums like them) are written, by name.
        gradients: the same added up to the shape of the thresholds.
    """

    name: str
    latent: Tensor
    thresholds: dict[str, nn.Parameter]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, Tensor] = field(default_factory=dict)
    transposed_groups: int = 0
    places: dict[str, int] = field(default_factory=dict)
    parameter: nn.Parameter | None = None
    effective: Tensor | None = None
    resets: int | Tensor = 0
    tau: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    dtau: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    _views: dict[str, Tensor] = field(default_factory=dict)
    _kernels: ThresholdKernels | None = None

    @property
    def size(self) -> int:
        """Number of the weight's elements."""
        return self.latent.numel()

    @property
    def kernels(self) -> ThresholdKernels:
        """The kernels that suit this weight best."""
        if self._kernels is None:
            self._kernels = for_tensors(self.matrix(self.latent), self.per_row())
        return self._kernels

    @property
    def has_gradient(self) -> bool:
        """Whether this step has a gradient for the weight."""
        return self.parameter is not None and self.parameter.grad is not None

    def matrix(self, x: Tensor, keep_as: str | None = None) -> Tensor:
        """Return ``x``, of the parameter's shape, as ``(out, n)``; see ``matrices.as_matrix``.

        ``keep_as``: a name under which the view is kept for the next call, as long as ``x`` stays where it is.
        """
        kept = self._views.get(keep_as) if keep_as else None
        if kept is not None and kept.data_ptr() == x.data_ptr():
            return kept
        matrix = as_matrix(x, self.transposed_groups)
        if keep_as and matrix.data_ptr() == x.data_ptr():
            self._views[keep_as] = matrix
        return matrix

    def per_row(self, key: str = "t") -> Tensor:
        """Return thresholds as ``(out, 1)`` or ``(out, n)``; kept for the next call, as in ``matrix``."""
        t = self.thresholds[key]
        kept = self._views.get(key)
        if kept is not None and kept.data_ptr() == t.data_ptr():
            return kept
        rows = self.matrix(t.detach()) if t.ndim > 1 else t.detach().unsqueeze(1)
        rows = rows.expand(self.matrix(self.latent).shape[0], -1)
        if rows.data_ptr() == t.data_ptr():
            self._views[key] = rows
        return rows

    def fold(self) -> None:
        """Add ``dtau`` up to ``gradients``, where it is no view of them."""
        for key, dtau in self.dtau.items():
            dt = self.gradients[key]
            if dtau.data_ptr() == dt.data_ptr():
                continue
            if dt.ndim == 1:
                self.kernels.add_rows(dtau, dt)
            else:
                write_matrix(dt, dtau, self.transposed_groups)

    def mask(self, key: str) -> Tensor:
        """Return the boolean tensor, of the parameter's shape, that ``bits`` keep."""
        mask = torch.empty_like(self.latent, dtype=torch.bool)
        matrix = self.matrix(mask)
        write_matrix(mask, matrix.copy_(unpack(self.bits[key], matrix.shape[1])), self.transposed_groups)
        return mask

    def keep_mask(self, key: str, mask: Tensor) -> None:
        """Keep a boolean tensor of the parameter's shape in ``bits``, in the order of the latent weights' memory."""
        self.bits[key] = pack(self.matrix(torch.empty_like(self.latent, dtype=torch.bool).copy_(mask)))

    def move_like(self, parameter: nn.Parameter) -> None:
        """Bring the state to the device and the order of memory of ``parameter``; thresholds stay the same objects."""
        masks = {key: self.mask(key) for key in self.bits}
        self.latent = torch.empty_like(parameter).copy_(self.latent)
        for key, buffer in self.buffers.items():
            self.buffers[key] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
        for key, mask in masks.items():
            self.keep_mask(key, mask)
        for t in self.thresholds.values():  # the same objects, which the optimizer may know from an earlier fit
            like = parameter if t.ndim > 1 else t
            t.data = torch.empty_like(like, dtype=t.dtype, device=parameter.device).copy_(t.data)
            t.grad = None
        self._kernels = None

    def release(self) -> None:
        """Let go of the module and the other weights; keep the state on the CPU."""
        self.parameter = None
        self.latent = self.latent.cpu()
        for tensors in (self.buffers, self.bits):
            tensors.update({key: tensor.cpu() for key, tensor in tensors.items()})
        for t in self.thresholds.values():
            t.data = torch.empty_like(t, device="cpu").copy_(t.data)
        self.dtau, self.gradients, self._views, self._kernels = {}, {}, {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module and the other weights."""
        state = {
            "latent": self.latent.detach(),
            "thresholds": {key: nn.Parameter(t.detach().clone()) for key, t in self.thresholds.items()},
            "buffers": {key: buffer.detach() for key, buffer in self.buffers.items()},
            "tau": torch.zeros(1, 1),
        }
        loose: dict[str, Any] = {
            "parameter": None,
            "effective": None,
            "dtau": {},
            "gradients": {},
            "_views": {},
            "_kernels": None,
        }
        return {**self.__dict__, **state, **loose}


class Pool:
    """Weights of one optimizer, whose thresholds lie end to end: one operation serves those of all weights.

    The optimizer still knows each weight's thresholds by themselves, as views.

    Args:
        weights: all on one device, with thresholds of the same names and one dtype.
        sums: names of further sums that the method forms like the gradients of thresholds.

    Attributes:
        weights: the same.
        values: all weights' thresholds, by name.
        gradients: their gradients, and the further sums.
        kernels: the kernels that suit these vectors best.
    """

    kernels: ThresholdKernels

    def __init__(self, weights: Sequence[LatentWeight], sums: Sequence[str]) -> None:
        self.weights = weights
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._places: list[tuple[nn.Parameter, Tensor]] = []
        names = list(weights[0].thresholds)
        for key in names:
            self.values[key] = self._lay_out([weight.thresholds[key] for weight in weights])
            self.kernels = for_tensors(*(self.values[key].unsqueeze(1),) * 2)
        for key in (*names, *sums):
            self._make_room(key, [weight.thresholds[names[0]] for weight in weights])

    def _lay_out(self, thresholds: Sequence[nn.Parameter]) -> Tensor:
        values = thresholds[0].new_empty(sum(t.numel() for t in thresholds))
        for t, view in zip(thresholds, _views(values, thresholds), strict=True):
            view.copy_(t)
            t.data = view
            self._places.append((t, view))
        return values

    def _make_room(self, key: str, thresholds: Sequence[Tensor]) -> None:
        self.gradients[key] = thresholds[0].new_zeros(sum(t.numel() for t in thresholds))
        for weight, dt in zip(self.weights, _views(self.gradients[key], thresholds), strict=True):
            weight.gradients[key] = dt
            rows = weight.matrix(dt) if dt.ndim > 1 else dt.unsqueeze(1)
            out = len(weight.matrix(weight.latent))
            weight.dtau[key] = rows if len(rows) == out else rows.new_empty(out, 1)

    def gather(self) -> None:
        """Take back thresholds to which an optimizer gave new storage."""
        for t, view in self._places:
            if t.data_ptr() != view.data_ptr():
                view.copy_(t)
                t.data = view

    def gradients_in_use(self) -> list[Tensor]:
        """Return the gradients of all thresholds that are about to take a step."""
        used = {}
        for weight in self.weights:
            for key, t in weight.thresholds.items():
                if t.grad is None:
                    continue
                view = weight.gradients[key]
                if t.grad is not view:  # someone gave it another
                    view.copy_(t.grad)
                    t.grad = view
                used[key] = self.gradients[key]
        return list(used.values())


def pools(weights: Iterable[LatentWeight], sums: Sequence[str]) -> list[Pool]:
    """Divide weights into pools: one, unless devices or dtypes differ."""
    alike: dict[Any, list[LatentWeight]] = {}
    for weight in weights:
        kind = (weight.latent.device, *(t.dtype for t in weight.thresholds.values()))
        alike.setdefault(kind, []).append(weight)
    return [Pool(members, sums) for members in alike.values()]


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Divide ``flat`` into tensors of the same shapes and orders of memory as those given."""
    views, start = [], 0
    for t in like:
        views.append(flat.as_strided(t.shape, t.stride(), start))
        start += t.numel()
    return views
