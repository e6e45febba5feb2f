"""Target: thresholds that follow a plan, so that exactly as many weights are left as were asked for.

After each update the thresholds of all weights of an optimizer are shifted by one number, at which as many weights pass
as the plan says. They take no steps of their own: networks were more accurate so (docs/guides/targets.md). At the end
of the plan the masks are frozen, at the target exactly.
"""

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import Options, option
from lightning_sparse.compat.shards import local
from lightning_sparse.families.common import (
    FINAL_SPARSITY,
    MIN_LAYER_DENSITY,
    check_min_layer_density,
    check_sparsity,
)
from lightning_sparse.families.shares import floors, least
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import budget
from lightning_sparse.rules.level import Cut, Look, Near, cuts
from lightning_sparse.rules.matrices import as_matrix, write_matrix
from lightning_sparse.rules.parts import Together, Whole, together
from lightning_sparse.rules.schedules import cubic
from lightning_sparse.rules.select import positions, top_k
from lightning_sparse.trainer.agreement import refuse_broken_clock
from lightning_sparse.trainer.guards import refuse_unknown_length
from lightning_sparse.trainer.readouts import Readouts
from lightning_sparse.trainer.updates import skips
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.latent import LatentWeight
from lightning_sparse.weights.latent_group import LatentGroup

__all__ = ["Number", "Plan", "Target", "Targeted"]

#: several thresholds or one
Number = TypeVar("Number", Tensor, float)


class Targeted(Options, Readouts, Verbs, ABC):
    """A method whose thresholds can follow a plan: its arguments, and what it is to shift them."""

    sparsity_target: float | None = option(
        alias="sparsity",
        default=None,
        check=check_sparsity,
        doc=f"{FINAL_SPARSITY} All thresholds are shifted together, so that the number of nonzeros falls by a cubic "
        "plan and ends at the target exactly; from then on the masks stay. None: there is no target.",
    )
    begin_at: float = option(
        default=0.2,
        check=partial(checks.fraction, "0 prunes from the start."),
        doc="share of the training after which pruning to ``sparsity`` begins, in [0, 1); until then thresholds rest.",
    )
    end_at: float = option(
        default=0.75,
        check=partial(checks.fraction, "0.75 leaves a quarter of the training to recover."),
        doc="share of the training after which ``sparsity`` is reached, above ``begin_at`` and at most 1.",
    )
    min_layer_density: float = option(
        default=0.0, check=check_min_layer_density, doc=f"with ``sparsity``, {MIN_LAYER_DENSITY}"
    )

    def __post_init__(self) -> None:
        """Check that the plan has a length."""
        super().__post_init__()
        if self.begin_at >= self.end_at:
            raise ValueError(
                f"begin_at must be below end_at={self.end_at!r}, got {self.begin_at!r}. 0 prunes from the start."
            )

    def new_target(self) -> "Target | None":
        """Return what the thresholds are shifted to meet, if anything."""
        return None if self.sparsity_target is None else Target(self, self.sparsity_target)

    def level(self, t: Number) -> Number:
        """Return ``tau``, which ``|W|`` is compared with."""
        return t

    def shifted(self, t: float, by: float) -> float:
        """Return a threshold that is ``by`` higher."""
        return t + by

    def margins(self, magnitudes: Tensor, t: Number) -> Tensor:
        """Return how far thresholds may be shifted until they reach ``magnitudes``; broadcasts."""
        return magnitudes - self.level(t)


@dataclass
class Plan:
    """How far the weights of one optimizer are.

    Attributes:
        group: the weights.
        size: number of elements of the weights.
        updates: number of updates so far.
        start: number of nonzeros when pruning began; None: it has not.
        look: how large the margins of those are that the next shift is found among.
    """

    group: LatentGroup
    size: int
    updates: int = 0
    start: int | None = None
    look: Look = field(default_factory=Look)

    @property
    def clock(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "start": self.start, **self.look._asdict()}

    @property
    def open(self) -> list[LatentWeight]:
        """The weights whose masks are not frozen."""
        return [weight for weight in self.group.weights if weight.frozen is None]

    def thresholds(self, weights: Sequence[LatentWeight]) -> list[float]:
        """Return the forward threshold of each of some weights: all that a weight has are equal."""
        values = [t for buffer in self.group.buffers for t in buffer.firsts()]
        of = dict(zip(self.group.weights, values, strict=True))
        return [of[weight] for weight in weights]


class Target:
    """The number of weights that the thresholds of a method leave, from update to update.

    The number after update t is ``K_t = K_f + (K_0 - K_f) (1 - (t - t_0) / (t_1 - t_0))^3``, where ``K_f`` is the
    budget and ``K_0`` the number at ``t_0``. The weights of each optimizer follow the plan by themselves.

    Args:
        method: whose thresholds are shifted.
        sparsity: at the end.
    """

    def __init__(self, method: Targeted, sparsity: float) -> None:
        self.method, self.sparsity = method, sparsity
        self._plans: dict[int, Plan] = {}
        self._clocks: list[dict[str, Any]] = []
        self._span: tuple[int, int] | None = None
        self._stepping = False

    # ------------------------------------------------------------------ a fit begins and ends

    def begin(self, groups: Mapping[int, LatentGroup], resumed: bool) -> None:
        """Plan for the weights of each optimizer, from the start or from where a checkpoint was."""
        clocks = self._clocks if resumed else []
        self._plans, self._span = {key: Plan(group, _size(group.weights)) for key, group in groups.items()}, None
        for plan, clock in zip(self._plans.values(), clocks, strict=False):
            plan.updates, plan.start = clock["updates"], clock["start"]
            plan.look = Look(clock.get("centre", 0.0), clock["width"])  # earlier versions wrote no centre

    def check(self) -> None:
        """Make sure that the plan has an end, and that its target can be met."""
        method = self.method
        refuse_unknown_length(method, method.total_steps, f"of which it prunes in the first {method.end_at:.0%}")
        for plan in self._plans.values():
            floors(plan.group.weights, method.min_layer_density, budget(self.sparsity, plan.size))

    def join(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Bring weights that join a plan under way to what it leaves of them."""
        plan, size = self._plans[id(optimizer)], _size(weights)
        plan.size += size
        if plan.start is None:
            return
        before = self._left(plan, plan.size - size, plan.start)
        plan.start += size
        self._bring(plan, weights, self.planned(plan) - before)

    def warn(self) -> None:
        """Tell of a training that ended before its plan."""
        for plan in self._plans.values():
            if plan.open:
                self.method.warn_once(
                    f"{self.method!r} has not come to its sparsity: the training ended after {plan.updates} updates, "
                    f"before the {self.span()[1]} of its plan. Set max_epochs or max_steps to what is really trained, "
                    "or lower end_at."
                )

    def release(self) -> None:
        """Let go of the weights; keep how far they are."""
        self._clocks, self._plans, self._span = [plan.clock for plan in self._plans.values()], {}, None

    def skip(self, updates: int) -> None:
        """Take so many updates for made."""
        for plan in self._plans.values():
            plan.updates += updates

    # ------------------------------------------------------------------ the plan

    def span(self) -> tuple[int, int]:
        """Return after which update pruning begins, and at which it ends; asked for once a step."""
        if self._span is None:
            total = self.method.total_steps
            last = max(1, min(math.ceil(self.method.end_at * total), int(total)))
            self._span = min(int(self.method.begin_at * total), last - 1), last
        return self._span

    def planned(self, plan: Plan) -> int:
        """Return the number of nonzeros now."""
        assert plan.start is not None
        return self._left(plan, plan.size, plan.start)

    def _left(self, plan: Plan, size: int, start: int) -> int:
        """Return how many nonzeros ``size`` weights have now that began with ``start``."""
        final = budget(self.sparsity, size)
        return final + round((start - final) * cubic(self._progress(plan)))

    def _progress(self, plan: Plan) -> float:
        """Return how far between its beginning, 0, and its end, 1, a plan is."""
        first, last = self.span()
        return min(max((plan.updates - first) / (last - first), 0.0), 1.0)

    @property
    def planned_sparsity(self) -> float | None:
        """Share of zeros that the plans ask for now; None before they begin."""
        begun = [plan for plan in self._plans.values() if plan.start is not None]
        size = sum(plan.size for plan in begun)
        return 1 - sum(self.planned(plan) for plan in begun) / size if size else None

    # ------------------------------------------------------------------ a step

    def prepare(self, optimizer: Optimizer, share: float) -> None:
        """See a step whose gradients are complete; ``share``: 0: there will be no update, see ``Verbs.before_step``."""
        self._stepping, self._span = share > 0, None
        plan = self._plans.get(id(optimizer))
        if plan is None or not share or plan.updates < self.span()[0]:
            return
        if plan.start is None:
            plan.start = sum(_count(weight) for weight in plan.group.weights)
            plan.start += self._near(plan.open, plan.thresholds(plan.open), Look()).count(0.0) if plan.open else 0

    @torch.no_grad()
    def calm(self, optimizer: Optimizer) -> None:
        """Make gradients of rows without a connection no longer than those of the other rows of their weight are.

        The output of such a row is constant, so a batch norm that follows multiplies what comes back by up to 316, the
        reciprocal of the square root of its ``eps``. Unbounded, such rows grew from 0.6 to 16 in four steps and took
        the whole budget. The bound is the root mean square of the lengths of the others; where there are none, or the
        plan has not begun, all stay as they are.
        """
        plan = self._plans.get(id(optimizer))
        if plan is None or plan.start is None:
            return
        weights = [weight for weight in plan.open if weight.has_gradient]
        found = [weight.kernels.occupied(weight.matrix(weight.values, "P")) for weight in weights]
        empty = together(weights).total(*(empty for empty, _ in found)) if weights else []
        for weight, (_, occupied), some in zip(weights, found, empty, strict=True):
            if some:
                weight.turn_gradient(partial(_bound, occupied, weight.part))

    def follow(self, optimizer: Optimizer) -> bool:
        """Count an update and do as planned; tell whether thresholds or masks are others now."""
        plan = self._plans.get(id(optimizer))
        if plan is None or not self._stepping or skips(optimizer):
            return False
        plan.updates += 1
        weights = plan.open
        if not weights or plan.updates <= self.span()[0]:
            return False
        self._bring(plan, weights, self.planned(plan) - sum(_count(weight) for weight in plan.group.weights))
        return True

    def _bring(self, plan: Plan, weights: Sequence[LatentWeight], k: int) -> None:
        """Leave ``k`` of some weights, for good if the plan has come to its end."""
        lowest = [least(weight, self.method.min_layer_density) for weight in weights]
        t = plan.thresholds(weights)
        found, plan.look = cuts(partial(self._near, weights, t), k, lowest, plan.look)
        frozen = self._chosen(weights, found) if plan.updates >= self.span()[1] else []
        self._shift(plan.group, weights, t, found)
        shrinkage = cubic(self._progress(plan))
        for weight in weights:
            weight.thresholds.shrinkage = shrinkage
        for weight, mask in zip(weights, frozen, strict=False):
            self._freeze(weight, mask)

    def _near(self, weights: Sequence[LatentWeight], t: Sequence[float], look: Look) -> Near:
        """Return the margins of some weights, whose thresholds are ``t``, that are about as large as it says."""
        bounds = {each: self._magnitudes(each, look) for each in set(t)}
        near = [  # NaN is above: it must stay in sight
            weight.kernels.near(weight.matrix(weight.latent, "W"), *bounds[each])
            for weight, each in zip(weights, t, strict=True)
        ]
        above, counts = [above for above, _ in near], [len(found) for _, found in near]
        magnitudes, part = torch.from_numpy(np.concatenate([found for _, found in near])), together(weights)
        if len(bounds) == 1:
            margins = self.method.margins(magnitudes, t[0])
        else:
            margins = self.method.margins(magnitudes, torch.from_numpy(np.repeat(t, counts)))
        return Near(part.total(*above), counts, margins.numpy(), part)

    def _magnitudes(self, t: float, look: Look) -> tuple[float, float]:
        """Return between which magnitudes those margins lie of a weight whose thresholds are ``t``."""
        low, high = (max(0.0, self.method.level(self.method.shifted(t, by))) for by in look.bounds)
        return low, high

    def _shift(
        self, group: LatentGroup, weights: Sequence[LatentWeight], t: Sequence[float], found: Sequence[Cut]
    ) -> None:
        """Shift the thresholds of some weights of a group to their cuts, all at once where these are the same."""
        if len(weights) == len(group.weights) and len({*zip(t, found, strict=True)}) == 1:
            vectors = [buffer.values["t"] for buffer in group.buffers]
        else:
            vectors = [local(weight.thresholds["t"].detach()) for weight in weights]
        for vector, each, cut in zip(vectors, t, found, strict=False):
            if cut.level:
                vector.fill_(self.method.shifted(each, cut.level))

    # ------------------------------------------------------------------ the end

    def _chosen(self, weights: Sequence[LatentWeight], found: Sequence[Cut]) -> list[Tensor]:
        """Return the final masks, as matrices: the largest margins, exactly as many as each cut is to leave.

        Of those that are equal to the least of them, which may lie in several weights, it is an even spread.
        """
        masks: dict[int, Tensor] = {}
        for cut in {id(cut): cut for cut in found}.values():
            ours = [i for i, other in enumerate(found) if other is cut]
            margins = [self._all_margins(weights[i]) for i in ours]
            chosen = _largest([each.reshape(-1) for each in margins], cut, together(weights))
            parts = torch.split(chosen, [each.numel() for each in margins])
            for i, each, part in zip(ours, margins, parts, strict=True):
                masks[i] = _without_empty_rows(weights[i], each, part.view(each.shape))
        return [masks[i] for i in range(len(weights))]

    def _all_margins(self, weight: LatentWeight) -> Tensor:
        magnitudes = _exact(weight.matrix(weight.latent).abs())
        margins = self.method.margins(magnitudes, _exact(weight.thresholds.per_row()))
        return margins.nan_to_num(math.inf, math.inf, -math.inf).masked_fill_(magnitudes == 0, -math.inf)

    def _freeze(self, weight: LatentWeight, mask: Tensor) -> None:
        """Let the mask decide from now on, also on what else the method masks."""
        frozen = weight.freeze(mask)
        for key in weight.bits:
            weight.keep_mask(key, frozen)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        clocks = [plan.clock for plan in self._plans.values()] or self._clocks
        return {"sparsity": self.sparsity, "plans": {str(index): clock for index, clock in enumerate(clocks)}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state; into the plans in use if fit has begun."""
        for clock in state["plans"].values():
            refuse_broken_clock(self.method, clock, ["updates"])
        self._clocks = list(state["plans"].values())
        self.begin({key: plan.group for key, plan in self._plans.items()}, resumed=True)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the weights of a fit."""
        return {**self.__dict__, "_clocks": list(self.state()["plans"].values()), "_plans": {}, "_span": None}


def _size(weights: Sequence[LatentWeight]) -> int:
    """Return the number of elements of some weights."""
    return sum(weight.size for weight in weights)


def _count(weight: LatentWeight) -> int:
    """Return the number of places that a weight's frozen mask leaves, 0 if it is not frozen."""
    return 0 if weight.frozen is None else int(weight.part.total(select.count(weight.frozen))[0])


def _exact(x: Tensor) -> Tensor:
    """Return numbers in double precision, where any device has it."""
    return x.cpu().double()


def _without_empty_rows(weight: LatentWeight, margins: Tensor, mask: Tensor) -> Tensor:
    """Return a mask, as a matrix, with as many ones, but one in each row that must not be empty.

    Such a row has its largest ``|W|``, as ``LatentWeight.write`` gives it; what has the least margins makes room.
    """
    rows = weight.nonempty
    if rows is None:
        return mask
    scores = torch.empty_like(weight.latent, device="cpu", dtype=margins.dtype)
    held = torch.empty_like(weight.latent, device="cpu", dtype=torch.bool)
    for x, matrix in ((scores, margins), (held, mask)):
        write_matrix(x, weight.matrix(x).copy_(matrix), weight.outputs)
    by_margin, by_size = as_matrix(scores, rows), as_matrix(weight.latent.abs().cpu(), rows)
    occupied = as_matrix(held, rows).any(1, keepdim=True)
    first = torch.where(occupied, by_margin.argmax(1, keepdim=True), by_size.argmax(1, keepdim=True))
    write_matrix(scores, by_margin.scatter(1, first, math.inf), rows)
    count = max(int(mask.count_nonzero()), rows.rows(weight.shape))
    return weight.matrix(held.copy_(top_k(scores, count)))


def _bound(occupied: Tensor, part: Whole, dP: Tensor, W: Tensor) -> None:
    """Make rows of ``dP`` that are not occupied as long as the others are, by root mean square, if they are longer."""
    squares = torch.linalg.vector_norm(dP, dim=1, dtype=torch.float64).square_()
    total, count = part.sums(torch.stack([squares[occupied].sum(), occupied.sum().double()])).unbind()
    factor = (total / count / squares).sqrt().clamp(max=1).masked_fill(occupied, 1).nan_to_num(1.0)
    dP.mul_(factor.to(dP.dtype).unsqueeze(1))


def _largest(margins: Sequence[Tensor], cut: Cut, part: Together) -> Tensor:
    """Mark exactly ``cut.k`` margins of several weights, those above its ``kth`` and an even spread of equal ones.

    Args:
        margins: of each, of what is here.
        cut: where they are cut.
        part: what is here.
    """
    joined = torch.cat([*margins])
    owners = torch.arange(len(margins)).repeat_interleave(torch.tensor([len(each) for each in margins]))
    chosen = joined > cut.kth
    for candidates in (joined == cut.kth, torch.ones_like(chosen)):
        found = positions(candidates & ~chosen)
        counts = torch.bincount(owners[found], minlength=len(margins)).tolist()
        chosen[found[part.evenly(counts, cut.k - part.total(select.count(chosen))[0])]] = True
    return chosen
