"""LatentWeight: what is kept of a weight whose dense latent values stand behind a sparse parameter."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_sparse.compat.shards import exchange, local
from lightning_sparse.kernels.bits import pack, unpack
from lightning_sparse.kernels.thresholds import ThresholdKernels, for_tensors
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, write_matrix
from lightning_sparse.rules.parts import WHOLE, Whole, part_of
from lightning_sparse.weights.base import all_finite
from lightning_sparse.weights.flat import alone
from lightning_sparse.weights.thresholds import WeightThresholds

__all__ = ["LatentWeight"]

Result = TypeVar("Result")


@dataclass(eq=False)
class LatentWeight:
    """One weight that trains sparse, or what a process holds of it.

    Where processes hold some rows of a parameter each, the DTensor ends here: all tensors are plain ones, of the rows
    that are here. Only ``shape`` and ``size`` are those of the whole weight.

    Attributes:
        name: the parameter's name in the LightningModule.
        latent: ``W``, of the parameter's shape.
        buffers: further tensors of the parameter's shape that belong to the method's state. "M", if there is one, is
            the mask by which ``P`` is made of ``W`` from now on.
        bits: boolean ones among them, packed; see ``mask``.
        outputs: where the layer's outputs lie.
        nonempty: where rows lie of which each keeps a nonzero; None: any may be empty.
        part: what this process holds of it.
        trained: its thresholds; None if the method has none.
        parameter: the module's parameter; None outside fit.
        effective: the storage of ``P`` while the parameter holds ``W``; else None.
    """

    name: str
    latent: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, Tensor] = field(default_factory=dict)
    outputs: Outputs = FIRST
    nonempty: Outputs | None = None
    part: Whole = WHOLE
    trained: WeightThresholds | None = None
    parameter: nn.Parameter | None = None
    effective: Tensor | None = None
    _views: dict[str, Tensor] = field(default_factory=dict)
    _kernels: ThresholdKernels | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.part.shape_of(self.latent)

    @property
    def size(self) -> int:
        """Number of the weight's elements."""
        return self.latent.numel() if self.part is WHOLE else math.prod(self.shape)

    @property
    def thresholds(self) -> WeightThresholds:
        """Its thresholds; only methods that train thresholds ask for them."""
        assert self.trained is not None, "the method has no thresholds"
        return self.trained

    @property
    def kernels(self) -> ThresholdKernels:
        """The kernels that suit this weight and its thresholds best."""
        if self._kernels is None:
            self._kernels = for_tensors(self.matrix(self.latent), self.thresholds.per_row())
        return self._kernels

    @property
    def frozen(self) -> Tensor | None:
        """The mask by which ``P`` is made of ``W`` from now on; None: the method makes it."""
        return self.buffers.get("M")

    def freeze(self, mask: Tensor) -> Tensor:
        """Make ``P`` by a mask ``(out, n)`` from now on; return it in the parameter's shape."""
        frozen = torch.empty_like(self.latent, dtype=torch.bool)
        write_matrix(frozen, self.matrix(frozen).copy_(mask), self.outputs)
        self.buffers["M"] = frozen
        return frozen

    @property
    def has_gradient(self) -> bool:
        """Whether this step has a gradient for the weight."""
        return self.parameter is not None and self.parameter.grad is not None

    @property
    def diverged(self) -> bool:
        """Some latent values or thresholds are NaN or infinite."""
        thresholds = [] if self.trained is None else self.trained.values.values()
        return not self.part.all(all(all_finite(local(x).detach()) for x in (self.latent, *thresholds)))

    # ------------------------------------------------------------------ as matrices

    def matrix(self, x: Tensor, keep_as: str | None = None) -> Tensor:
        """Return ``x``, of the parameter's shape, as ``(out, n)``; see ``matrices.as_matrix``.

        ``keep_as``: a name under which the view is kept for the next call, as long as ``x`` stays where it is.
        """
        kept = self._views.get(keep_as) if keep_as else None
        if kept is not None and kept.data_ptr() == x.data_ptr():
            return kept
        matrix = as_matrix(x, self.outputs)
        if keep_as and matrix.data_ptr() == x.data_ptr():
            self._views[keep_as] = matrix
        return matrix

    def write(self, P: Tensor, effective: Callable[[Tensor, Tensor], Result]) -> Result:
        """Write ``P``.

        Args:
            P: of the parameter's shape.
            effective: writes ``P (out, n)``, its second argument, made of ``W (out, n)``, its first one.

        Returns:
            What ``effective`` returns.
        """
        same_layout = P.stride() == self.latent.stride()
        work = P if same_layout else torch.empty_like(self.latent)
        out = self.matrix(work, "P" if same_layout else None)
        result = effective(self.matrix(self.latent, "W"), out)
        write_matrix(work, out, self.outputs)
        if not same_layout:
            P.copy_(work)
        if self.nonempty is not None:
            _refill(P, self.latent, self.nonempty)
        return result

    def turn_gradient(self, gradients: Callable[[Tensor, Tensor], None]) -> None:
        """Make the parameter's gradient that of ``W``, in place.

        Args:
            gradients: turns ``dP (out, n)`` into ``dW``; it gets ``W (out, n)`` as well.
        """
        gradient = self.gradient
        same_layout = gradient.stride() == self.latent.stride()
        work = gradient if same_layout else torch.empty_like(self.latent).copy_(gradient)
        dP = self.matrix(work)
        gradients(dP, self.matrix(self.latent, "W"))
        write_matrix(work, dP, self.outputs)
        if not same_layout:
            gradient.copy_(work)

    # ------------------------------------------------------------------ around an update of the optimizer

    @property
    def values(self) -> Tensor:
        """The parameter's values, as a tensor that is kept as long as they stay where they are."""
        assert self.parameter is not None
        kept, here = self._views.get("values"), local(self.parameter)
        if kept is None or kept.data_ptr() != here.data_ptr() or kept.shape != here.shape:
            kept = self._views["values"] = here.data
        return kept

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient."""
        assert self.parameter is not None
        assert self.parameter.grad is not None
        return local(self.parameter.grad)

    def undo_outside(self, key: str) -> None:
        """Give ``W`` the values that the parameter holds, outside of a boolean buffer."""
        self.latent.copy_(torch.where(self.buffers[key], self.latent, self.values))

    def enter(self) -> None:
        """Give the parameter ``W`` for an update, if there will be one."""
        assert self.parameter is not None
        steps = self.has_gradient or (self.trained is not None and self.trained.have_gradient)
        if steps and self.effective is None:
            self.effective = self.values
            exchange(self.parameter, self.latent)

    def leave(self) -> bool:
        """Take ``W`` back from the parameter, which then wants its ``P``; tell whether an update was under way."""
        if self.effective is None or self.parameter is None:
            return False
        if (updated := local(self.parameter)).data_ptr() != self.latent.data_ptr():  # the optimizer gave it new storage
            self.latent = updated.data
        exchange(self.parameter, self.effective)
        self.effective = None
        return True

    # ------------------------------------------------------------------ state

    def mask(self, key: str) -> Tensor:
        """Return the boolean tensor, of the parameter's shape, that ``bits`` keep."""
        mask = torch.empty_like(self.latent, dtype=torch.bool)
        matrix = self.matrix(mask)
        write_matrix(mask, matrix.copy_(unpack(self.bits[key], matrix.shape[1])), self.outputs)
        return mask

    def keep_mask(self, key: str, mask: Tensor) -> None:
        """Keep a boolean tensor of the parameter's shape in ``bits``, in the order of the latent weights' memory."""
        self.bits[key] = pack(self.matrix(torch.empty_like(self.latent, dtype=torch.bool).copy_(mask)))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and plain values only."""
        buffers = {**self.buffers, **{key: self.mask(key) for key in self.bits}}
        thresholds = {"thresholds": {}, "places": {}} if self.trained is None else self.trained.state()
        return {
            "latent": self.part.joined(self.latent.detach()),
            "buffers": {key: self.part.joined(buffer.detach()) for key, buffer in buffers.items()},
            "outputs": self.outputs._asdict(),
            **thresholds,
        }

    def here(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this process holds of a state, all of whose tensors are whole, or divided as this weight is."""
        trained = {key: self.thresholds.here(t) for key, t in state["thresholds"].items()}
        buffers = {key: self.part.cut(buffer) for key, buffer in state["buffers"].items()}
        return {**state, "latent": self.part.cut(state["latent"]), "buffers": buffers, "thresholds": trained}

    @classmethod
    def loaded(cls, name: str, state: Mapping[str, Any], masks: Collection[str]) -> "LatentWeight":
        """Return a weight as it was saved; ``masks``: which of its buffers are kept as bits."""
        weight = cls(name, state["latent"], outputs=Outputs.of_state(state))
        if state["thresholds"]:
            weight.trained = WeightThresholds.loaded(weight.latent, weight.outputs, state)
        for key, buffer in state["buffers"].items():
            if key in masks:
                weight.keep_mask(key, buffer)
            else:
                weight.buffers[key] = buffer
        return weight

    def copy_(self, other: "LatentWeight") -> None:
        """Take the state of another of the same shape."""
        self.latent.copy_(other.latent)
        if self.trained is not None:
            self.trained.copy_(other.thresholds)
        for key, buffer in other.buffers.items():
            self.buffers[key] = torch.empty_like(self.latent, dtype=buffer.dtype).copy_(buffer)
        for key in self.bits:
            self.keep_mask(key, other.mask(key))

    def move_to(self, parameter: nn.Parameter, outputs: Outputs) -> None:
        """Stand behind ``parameter``, with the state on its device and in its order of memory."""
        masks, values = {key: self.mask(key) for key in self.bits}, local(parameter)
        self.outputs, self.part = outputs, part_of(parameter)
        self.latent = torch.empty_like(values).copy_(self.latent)
        for key, buffer in self.buffers.items():
            self.buffers[key] = torch.empty_like(values, dtype=buffer.dtype).copy_(buffer)
        for key, mask in masks.items():
            self.keep_mask(key, mask)
        if self.trained is not None:
            self.trained.move_like(parameter, outputs)
        self.parameter, self.effective, self._kernels, self._views = parameter, None, None, {}

    def release(self) -> None:
        """Let go of the module and the other weights; keep the state on the CPU."""
        self.parameter = None
        self.latent = alone(self.latent.cpu())
        for tensors in (self.buffers, self.bits):
            tensors.update({key: alone(tensor.cpu()) for key, tensor in tensors.items()})
        if self.trained is not None:
            self.trained.release()
        self._views, self._kernels = {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module and the other weights."""
        buffers = {key: buffer.detach() for key, buffer in self.buffers.items()}
        loose: dict[str, Any] = {"parameter": None, "effective": None, "_views": {}, "_kernels": None}
        return {**self.__dict__, "latent": self.latent.detach(), "buffers": buffers, **loose}


def _refill(P: Tensor, latent: Tensor, nonempty: Outputs) -> None:
    """Write the largest latent value of each empty row into ``P``.

    Its size does not matter: what is left of a row is divided by its norm.
    """
    rows, W = as_matrix(P, nonempty), as_matrix(latent, nonempty)
    first = W.abs().argmax(1, keepdim=True)
    kept = torch.where((rows == 0).all(1, keepdim=True), W.gather(1, first), rows.gather(1, first))
    write_matrix(P, rows.scatter(1, first, kept), nonempty)
