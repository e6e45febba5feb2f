"""Projection: how parameters get ``P``, which is made of the latent weights ``W`` behind them."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lightning_sparse.families.thresholds import Thresholds
from lightning_sparse.rules.select import zero_outside_
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.joined import Joined
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["Projection", "keep_mask", "parameter"]


class _Method(Protocol):
    """What a projection asks of its method."""

    _fit: Fit
    _trained: Thresholds | None

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None: ...


class Projection:
    """Makes ``P`` of ``W``: by the mask that stays, if there is one, else by the method's function.

    Args:
        method: whose ``effective`` makes ``P``; its thresholds, if it has any, are set before.
    """

    def __init__(self, method: _Method) -> None:
        self.method = method

    def project(self, parts: Sequence[LatentWeight | Joined]) -> None:
        """Write ``P`` into the parameters of some weights, after the collapse guard.

        Args:
            parts: weights by themselves, and those that are computed with at once.
        """
        for joined in [part for part in parts if isinstance(part, Joined)]:
            self._project_all(joined)
        weights = [part for part in parts if not isinstance(part, Joined)]
        passing = [self.write(weight, weight.values) for weight in weights]
        thresholds, note = self.method._trained, self.method._fit.traces.note
        for weight in thresholds.reset_collapsed(weights, passing) if thresholds else ():
            self.write(weight, weight.values)
        for weight in weights:
            note(parameter(weight))

    def _project_all(self, joined: Joined) -> None:
        """Write ``P`` into the parameters of weights that lie together, after the collapse guard."""
        joined.write(partial(self._make_all, joined))
        for weight in joined.weights:
            self.method._fit.traces.note(parameter(weight))

    def _make_all(self, joined: Joined, W: Tensor, out: Tensor) -> None:
        """Write ``P`` of weights that lie together; once more if the guard has reset thresholds."""
        weight, thresholds = cast(LatentWeight, joined), self.method._trained
        if thresholds:
            thresholds.set_levels(weight)
        passing = self.method.effective(weight, W, out)
        if thresholds and thresholds.reset_all_collapsed(joined, passing):
            thresholds.set_levels(weight)
            self.method.effective(weight, W, out)

    def write_all(self, joined: Joined) -> None:
        """Write ``P`` into the parameters of weights that have just been laid together, without the guard."""
        weight = cast(LatentWeight, joined)
        if self.method._trained:
            self.method._trained.set_levels(weight)
        joined.write(partial(self.method.effective, weight))
        for each in joined.weights:
            self.method._fit.traces.note(parameter(each))

    def write(self, weight: LatentWeight, P: Tensor) -> int | Tensor | None:
        """Write ``P`` of one weight into a tensor; return how many weights pass, if the method counts them."""
        if weight.frozen is not None:
            return weight.write(P, partial(_masked, weight))
        if self.method._trained:
            self.method._trained.set_levels(weight)
        return weight.write(P, partial(self.method.effective, weight))

    @torch.no_grad()
    def made(self, weight: LatentWeight) -> Tensor:
        """Return ``P`` of one weight, a new tensor."""
        P = torch.empty_like(weight.latent)
        self.write(weight, P)
        return P


def parameter(weight: LatentWeight) -> nn.Parameter:
    """Return the parameter of a weight that is in a fit."""
    assert weight.parameter is not None
    return weight.parameter


def keep_mask(weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
    """Replace ``dP`` by ``dP * M``, M being the mask that stays."""
    assert weight.frozen is not None
    zero_outside_(dP, weight.matrix(weight.frozen, "M"))


def _masked(weight: LatentWeight, W: Tensor, out: Tensor) -> None:
    """Write ``W * M``, M being the mask that stays."""
    assert weight.frozen is not None
    zero_outside_(out.copy_(W), weight.matrix(weight.frozen, "M"))
