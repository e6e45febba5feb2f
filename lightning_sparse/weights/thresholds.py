"""Trained thresholds: those of one weight, and those of several weights laid end to end."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse.compat.shards import exchange, is_sharded, joined, layout, local
from lightning_sparse.kernels.thresholds import ThresholdKernels, for_tensors, fused
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, write_matrix
from lightning_sparse.rules.parts import WHOLE, Shard, Whole
from lightning_sparse.weights.flat import views

__all__ = ["Granularity", "ThresholdBuffer", "WeightThresholds", "buffers"]

Granularity = Literal["neuron", "layer", "weight"]


@dataclass(eq=False)
class WeightThresholds:
    """The trained thresholds of one weight, or of the rows of it that a process holds.

    Of a weight that is divided over processes the optimizer has DTensors, divided as its rows are; one for the whole
    layer is the same on all of them. All other tensors are plain ones, of what is here.

    Attributes:
        values: by name, as the optimizer has them; ``"t"`` is the forward one. Of shape ``(out,)``, ``(1,)`` or the
            weight's, after the granularity.
        rows: ``out``, the number of the weight's neurons or filters that are here.
        outputs: where the weight's outputs lie.
        places: where each threshold stands in the param group of its weight, by which a checkpoint knows its state.
        resets: how often the collapse guard set them to 0.
        tau: what ``|W|`` is compared with by the latest ``P``, ``(out, 1)`` or ``(out, n)``.
        dtau: where a step's gradients of ``tau`` (and what else the method sums like them) are written, by name.
        gradients: the same added up to the shape of the thresholds.
        shrinkage: by how much of ``tau`` a method with a soft threshold shrinks the weights above it, from 0 to 1.
        part: what this process holds of the weight.
    """

    values: dict[str, nn.Parameter]
    rows: int
    outputs: Outputs = FIRST
    places: dict[str, int] = field(default_factory=dict)
    resets: int | Tensor = 0
    shrinkage: float = 1.0
    tau: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    dtau: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    part: Whole = WHOLE
    _views: dict[str, Tensor] = field(default_factory=dict)
    _among: tuple[Tensor, int] | None = None  # a vector that has "t" from a place on, all levels of which are computed

    @classmethod
    def new(
        cls, latent: Tensor, outputs: Outputs, granularity: Granularity, start: Mapping[str, float], part: Whole = WHOLE
    ) -> "WeightThresholds":
        """Return thresholds of the values ``start``, in at least float32, since their steps are small.

        Args:
            latent: what is here of the weight.
            outputs: see above, as ``part``.
            granularity: what has a threshold each.
            start: their values by name.
            part: see above.
        """
        rows = outputs.rows(latent.shape)
        dtype = torch.promote_types(latent.dtype, torch.float32)

        def filled(value: float) -> Tensor:
            if granularity == "weight":
                return torch.full_like(latent, value, dtype=dtype)  # in the same order of memory
            count = rows if granularity == "neuron" else 1
            return torch.full((count,), value, dtype=dtype, device=latent.device)

        values = {key: nn.Parameter(_divided(filled(value), granularity, part)) for key, value in start.items()}
        return cls(values, rows, outputs, part=part)

    @classmethod
    def loaded(cls, latent: Tensor, outputs: Outputs, state: Mapping[str, Any]) -> "WeightThresholds":
        """Return those of a weight of a checkpoint."""
        values = {key: nn.Parameter(t) for key, t in state["thresholds"].items()}
        loaded = cls(values, outputs.rows(latent.shape), outputs, places=dict(state.get("places", {})))
        loaded.shrinkage = state.get("shrinkage", 1.0)  # earlier versions wrote none
        return loaded

    def __getitem__(self, key: str) -> nn.Parameter:
        """Return the thresholds of a name."""
        return self.values[key]

    @property
    def of_neurons(self) -> bool:
        """There is one for each neuron, and several neurons."""
        return any(t.ndim == 1 and len(t) > 1 for t in self.values.values())

    @property
    def have_gradient(self) -> bool:
        """Whether one of them is about to take a step."""
        return any(t.grad is not None for t in self.values.values())

    def per_row(self, key: str = "t") -> Tensor:
        """Return thresholds as ``(out, 1)`` or ``(out, n)``: a view, kept as long as they stay where they are."""
        t = local(self.values[key])
        kept = self._views.get(key)
        if kept is not None and kept.data_ptr() == t.data_ptr():
            return kept
        rows = self.as_rows(t.detach())
        if rows.data_ptr() == t.data_ptr():
            self._views[key] = rows
        return rows

    def as_rows(self, t: Tensor) -> Tensor:
        """Return a tensor of the shape of thresholds as ``(out, 1)`` or ``(out, n)``."""
        rows = as_matrix(t, self.outputs) if t.ndim > 1 else t.unsqueeze(1)
        return rows.expand(self.rows, -1)

    def lie_among(self, values: Tensor, place: int) -> None:
        """Have levels computed in a vector that holds ``t`` from a place on: so they are rounded alike."""
        self._among = values, place

    def set_levels(self, level: Callable[[Tensor], Tensor]) -> None:
        """Set ``tau``, for ``P`` to be made of."""
        if self._among is None:
            self.tau = level(self.per_row())
            return
        values, place = self._among
        ours = level(values)[place : place + self.values["t"].numel()]
        self.tau = ours.unsqueeze(1).expand(self.rows, 1)

    def fold(self, kernels: ThresholdKernels) -> None:
        """Add ``dtau`` up to ``gradients``, where it is no view of them."""
        for key, dtau in self.dtau.items():
            dt = self.gradients[key]
            if dtau.data_ptr() == dt.data_ptr():
                continue
            if dt.ndim == 1:
                kernels.add_rows(dtau, dt)
            else:
                write_matrix(dt, dtau, self.outputs)

    @property
    def everywhere(self) -> bool:
        """They are the same on all processes, each of which has a part of the weight."""
        return any(is_sharded(t) and not layout(t).by_rows for t in self.values.values())

    def here(self, t: Tensor) -> Tensor:
        """Return what this process holds of a tensor like the thresholds, which is whole or divided as they are."""
        return local(t) if self.everywhere else self.part.cut(t)

    def divided(self, key: str, x: Tensor) -> Tensor:
        """Return a tensor that is like the thresholds of a name as the optimizer has them, of which ``x`` is here."""
        t = self.values[key]
        return joined(x, layout(t)) if is_sharded(t) else x

    def hand_out(self, key: str) -> None:
        """Give thresholds their gradient, for the optimizer to see."""
        self.values[key].grad = self.divided(key, self.gradients[key])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        values = {key: t.detach() for key, t in self.values.items()}
        return {"thresholds": values, "places": dict(self.places), "shrinkage": self.shrinkage}

    def copy_(self, others: "WeightThresholds") -> None:
        """Take the values of others of the same names and shapes."""
        self.shrinkage = others.shrinkage
        for key, t in self.values.items():
            local(t).copy_(others[key])

    def move_like(self, parameter: nn.Parameter, outputs: Outputs) -> None:
        """Go to the device and the order of memory of ``parameter``; an optimizer may know them: they stay the same."""
        self.outputs, self._among = outputs, None
        for t in self.values.values():
            like = local(parameter if t.ndim > 1 else t)
            exchange(t, torch.empty_like(like, dtype=t.dtype, device=parameter.device).copy_(local(t)))
            t.grad = None

    def release(self) -> None:
        """Let go of the other weights; keep the state on the CPU."""
        for t in self.values.values():
            exchange(t, torch.empty_like(local(t), device="cpu").copy_(local(t)))
        self.dtau, self.gradients, self._views, self._among = {}, {}, {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the other weights."""
        values = {key: nn.Parameter(local(t).detach().clone()) for key, t in self.values.items()}
        loose: dict[str, Any] = {"dtau": {}, "gradients": {}, "_views": {}, "_among": None}
        return {**self.__dict__, "values": values, "tau": torch.zeros(1, 1), **loose}


class ThresholdBuffer:
    """The thresholds of several weights, laid end to end: one operation serves all of them.

    The optimizer still knows each weight's thresholds by themselves, as views.

    Args:
        thresholds: those of the weights, all on one device, of the same names and one dtype.
        sums: names of further sums that the method forms like the gradients of thresholds.

    Attributes:
        thresholds: the same.
        values: all weights' thresholds, by name.
        gradients: their gradients, and the further sums.
        kernels: the kernels that suit these vectors best.
        joins: the weights can lie end to end, too.
    """

    kernels: ThresholdKernels

    def __init__(self, thresholds: Sequence[WeightThresholds], sums: Sequence[str] = (), joins: bool = False) -> None:
        self.thresholds, self.joins = thresholds, joins
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._slots: list[tuple[nn.Parameter, Tensor]] = []
        names = list(thresholds[0].values)
        for key in names:
            self.values[key] = self._lay_out([each[key] for each in thresholds])
            vector = self.values[key]
            self.kernels = fused(vector.device) if joins else for_tensors(*(vector.unsqueeze(1),) * 2)
        place = 0
        for each in thresholds if joins else ():
            each.lie_among(self.values[names[0]], place)
            place += each[names[0]].numel()
        for key in (*names, *sums):
            self._lay_out_gradients(key, [each[names[0]] for each in thresholds])

    def _lay_out(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Move parameters into one vector, of which they become views."""
        here = [local(t).detach() for t in parameters]
        values = here[0].new_empty(sum(t.numel() for t in here))
        for t, own, view in zip(parameters, here, views(values, here), strict=True):
            exchange(t, view.copy_(own))
            self._slots.append((t, view))
        return values

    def _lay_out_gradients(self, key: str, parameters: Sequence[nn.Parameter]) -> None:
        """Give all weights room for the gradients of their thresholds, or a sum like them, in one vector."""
        here = [local(t).detach() for t in parameters]
        self.gradients[key] = here[0].new_zeros(sum(t.numel() for t in here))
        for each, dt in zip(self.thresholds, views(self.gradients[key], here), strict=True):
            each.gradients[key] = dt
            rows = as_matrix(dt, each.outputs) if dt.ndim > 1 else dt.unsqueeze(1)
            each.dtau[key] = rows if len(rows) == each.rows else rows.new_empty(each.rows, 1)

    @cached_property
    def _places(self) -> tuple[list[int], Tensor]:
        """How many forward thresholds of each weight are here, and where the first one is of those that have any."""
        sizes = [local(each["t"]).numel() for each in self.thresholds]
        places = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True) if size]
        return sizes, torch.tensor(places, dtype=torch.long, device=self.values["t"].device)

    def firsts(self) -> list[float]:
        """Return the first forward threshold of each weight; 0 where none is here."""
        sizes, places = self._places
        found = iter(self.values["t"].take(places).tolist())
        return [next(found) if size else 0.0 for size in sizes]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The thresholds as the optimizer knows them."""
        return [t for each in self.thresholds for t in each.values.values()]

    def gather(self) -> None:
        """Take back thresholds to which an optimizer gave new storage."""
        for t, view in self._slots:
            if local(t).data_ptr() != view.data_ptr():
                exchange(t, view.copy_(local(t)))

    def add_parts(self) -> None:
        """Add up, over the processes, gradients of thresholds that all of them have, as of whole layers."""
        one = self.thresholds[0]
        if one.everywhere:
            sums = one.part.sums(torch.stack([*self.gradients.values()]))
            for dt, total in zip(self.gradients.values(), sums, strict=True):
                dt.copy_(total)

    def marked(self, where: Tensor) -> list[WeightThresholds]:
        """Return those with a True in ``where``, a boolean vector like ``values``."""
        parts = torch.split(where, [local(next(iter(each.values.values()))).numel() for each in self.thresholds])
        return [each for each, part in zip(self.thresholds, parts, strict=True) if bool(part.any())]

    def gradients_in_use(self) -> list[Tensor]:
        """Return the gradients of all thresholds that are about to take a step."""
        used = {}
        for each in self.thresholds:
            for key, t in each.values.items():
                if t.grad is None:
                    continue
                view, given = each.gradients[key], local(t.grad)
                if given.data_ptr() != view.data_ptr():  # someone gave it another
                    view.copy_(given)
                    each.hand_out(key)
                used[key] = self.gradients[key]
        return list(used.values())


def _divided(t: Tensor, granularity: Granularity, part: Whole) -> Tensor:
    """Return the thresholds that the optimizer is to have, of which ``t`` are here."""
    if not isinstance(part, Shard):
        return t
    if granularity == "layer":
        return joined(t, part.layout.everywhere(t.shape))
    return joined(t, part.layout if granularity == "weight" else part.layout.of_rows)


def buffers(
    thresholds: Iterable[WeightThresholds],
    sums: Sequence[str] = (),
    joins: Callable[[WeightThresholds], Hashable] = lambda _: None,
) -> list[ThresholdBuffer]:
    """Lay thresholds end to end: in one buffer, unless devices or dtypes differ, or what ``joins`` says of them.

    ``joins``: those of which it says the same, but None, have weights that can lie end to end, too.
    """
    alike: dict[Any, list[WeightThresholds]] = {}
    for each in thresholds:
        kind = tuple((t.device, t.dtype) for t in each.values.values())
        alike.setdefault((kind, joins(each)), []).append(each)
    return [ThresholdBuffer(members, sums, kind is not None) for (_, kind), members in alike.items()]
