"""ForeignWrites: values that other code has written into the parameters of latent weights become part of ``W``."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.families.projection import Projection, parameter
from lightning_sparse.rules import select
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["ForeignWrites"]


class _Method(Protocol):
    """What is asked of a method whose parameters other code may write into."""

    _fit: Fit

    def latent(self, weight: LatentWeight, P: Tensor) -> Tensor: ...

    def written(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None: ...

    def warn_once(self, message: str) -> None: ...


class ForeignWrites:
    """Finds and takes what other code has written; a 0 written over a 0 says nothing.

    Args:
        method: whose ``latent`` says which ``W`` the values stand for.
        projection: what makes the method's own ``P``, with which parameters are compared.
    """

    def __init__(self, method: _Method, projection: Projection) -> None:
        self.method, self.projection = method, projection

    @torch.no_grad()
    def take(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Take what other code has written into some weights of ``optimizer``, if it has."""
        changed, added = [], []
        for weight in weights:
            found = self._changed(weight) if weight.effective is None else None
            if found is not None:
                changed.append(weight)
                added += [weight] if self._take_over(weight, *found) else []
        if added:
            self.method.written(optimizer, added)
        self.projection.project(changed)

    def _changed(self, weight: LatentWeight) -> tuple[Tensor, Tensor] | None:
        """Return the ``P`` of a weight's ``W``, and where its parameter is another, a boolean tensor; None: nowhere."""
        X, P, fit = weight.values, self.projection.made(weight), self.method._fit
        same = torch.equal(X, P)
        where = torch.zeros_like(X, dtype=torch.bool) if same else (X != P).logical_and_(~(X.isnan() & P.isnan()))
        if not weight.part.any(0 if same else select.count(where)):
            fit.traces.note(parameter(weight))
            return None
        if not fit.traces.differs(parameter(weight)):  # through .data, as may be done at every step
            fit.looks.always()
        return P, where

    def _take_over(self, weight: LatentWeight, P: Tensor, where: Tensor) -> bool:
        """Take what was written over ``P`` ``where``; tell whether there are values where there was 0."""
        X = weight.values
        added = where & (P == 0) & (X != 0)
        weight.latent.copy_(torch.where(where, self.method.latent(weight, X), weight.latent))
        self.method._fit.tell_once(f"{self.method!r} goes on with what other code wrote into {weight.name}.")
        lost = 0 if weight.frozen is None else weight.part.total(select.count(torch.gt(added, weight.frozen)))[0]
        if lost:
            self.method.warn_once(
                f"{self.method!r} has set {lost} values to 0 that other code wrote into {weight.name} outside of its "
                "mask, which stays since sparsity was reached: load weights before the fit, or before that."
            )
        return weight.part.any(select.count(added))
