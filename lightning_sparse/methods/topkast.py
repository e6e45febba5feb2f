"""Top-KAST: top-K always sparse training (Jayakumar et al., NeurIPS 2020), with annealing and powerpropagation.

Sections 2.1-2.3; annealing as in AutoSparse (its Sec. 4.2, "TopKAST + GA"); Schwarz et al., NeurIPS 2021. Decisions:
weights outside of B do not move at all, whatever the optimizer's momentum and weight decay; one that enters B starts
with fresh optimizer state; annealing scales the loss's gradient, not the penalty's.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.compat.torch_private import copy_each
from lightning_sparse.families.annealing import Annealed
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import apportion, budget
from lightning_sparse.rules.powerpropagation import power_, root, times_derivative_
from lightning_sparse.weights.entering import refresh

__all__ = ["TopKAST"]


class TopKAST(Annealed, TopKCallback):
    r"""Top-K Always Sparse Training: compute with the largest weights, update somewhat more of them.

    With D the density, A the D largest ``|W|`` and B the ``1 - backward_sparsity`` largest, which hold A, the layer
    computes with ``P = W * 1_A``. Backward, ``dW = dP`` on A, ``alpha_i dP`` on the rest of B, and 0 outside, where
    ``W`` does not move; ``alpha_i = alpha * decay(i)`` in epoch i. The penalty
    ``l2 / 2 (sum_A W^2 + sum_{B - A} W^2 / D)`` is added to the loss, so only weights that learn fast enough enter A.

    Raises:
        MisconfigurationException: at fit start, if the decay needs the number of epochs and nothing bounds it.

    Example:
        >>> from lightning_sparse import TopKAST
        >>> callback = TopKAST(sparsity=0.8, backward_sparsity=0.5)

    Reference:
        "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020.
    """

    sparsity_target: float = option(
        alias="sparsity", kw_only=False, doc="share of zeros over all selected weights, ``1 - D``, in [0, 1)."
    )
    backward_sparsity: float = option(
        kw_only=False,
        check=partial(checks.fraction, "0 updates all weights."),
        doc="share of weights that are not updated, at most ``sparsity``; 0 updates all.",
    )
    alpha: float = option(
        default=1.0,
        check=partial(checks.fraction, "1 is plain Top-KAST; annealing starts at 0.75 to 1."),
        doc="gradient scale in B outside of A at the start, in [0, 1]; 1 is plain Top-KAST.",
    )
    power: float = option(
        default=1.0,
        check=partial(checks.at_least, 1, "1 trains the weights themselves."),
        doc="powerpropagation's exponent, at least 1: v is trained, and ``W = v |v|^(power-1)``. The paper's: 2 to 4.",
    )
    l2: float = option(
        default=1e-4,
        check=partial(checks.at_least, 0, "The paper's value for ResNet-50 is 1e-4."),
        doc="weight of the penalty, at least 0. It replaces the optimizer's weight decay.",
    )

    must_stay = ("power",)
    joins = True

    def __post_init__(self) -> None:
        """Check that B can hold A."""
        super().__post_init__()
        if self.backward_sparsity > self.sparsity_target:
            raise ValueError(
                f"backward_sparsity must be at most sparsity={self.sparsity_target!r}, got "
                f"{self.backward_sparsity!r}: the weights that compute are among those that are updated. Lower it; "
                "0 updates all."
            )
        self._l2_now = self.l2

    # ------------------------------------------------------------------ what users read

    @property
    def latents(self) -> dict[str, Tensor]:
        """The dense trained weights by parameter name: ``W``, or under powerpropagation ``v``."""
        return super().latents

    @property
    def backward_masks(self) -> dict[str, Tensor]:
        """The set B of each weight: a boolean tensor of the weight's shape, by parameter name."""
        return {name: weight.part.joined(weight.buffers["B"]) for name, weight in self._weights.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights whose gradient is used: B, or once alpha is 0, A."""
        if self.current_alpha == 0:
            return self.layer_density
        return self.densities(self._sets_of_updated())

    @property
    def backward_density(self) -> float:
        """Share of all selected weights whose gradient is used."""
        return self.gradient_density

    # ------------------------------------------------------------------ the method

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """All weights are in both sets until they are chosen."""
        return {key: torch.ones_like(latent, dtype=torch.bool) for key in ("A", "B")}

    def begin(self, weight: LatentWeight) -> None:
        """Find the ``v`` of powerpropagation whose weight is the given one."""
        weight.latent = self.latent(weight, weight.latent)

    def latent(self, weight: LatentWeight, P: Tensor) -> Tensor:
        """``v = sign(P) |P|^(1/power)``."""
        return root(P, self.power)

    def scale(self, weight: LatentWeight, factor: float) -> None:
        """Multiply ``P = v |v|^(power-1)`` by a factor."""
        super().scale(weight, factor ** (1 / self.power))

    def choose(self, weights: Sequence[LatentWeight], updates: int) -> None:
        """Find A, and B around it: ``|v|`` ranks as ``|W|`` does."""
        sizes = [weight.size for weight in weights]
        counts = self.counts(weights, updates)
        total = budget(self.backward_sparsity, sum(sizes))
        if self.scope == "global":
            wider = self.largest(weights, total, counts)
        else:
            room = [size - count for size, count in zip(sizes, counts, strict=True)]
            more = apportion(total - sum(counts), room, room)
            wider = [count + n for count, n in zip(counts, more, strict=True)]
        for weight, a, b in zip(weights, counts, wider, strict=True):
            self.mark(weight, "A", a)
            self.mark(weight, "B", b)

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> None:
        """Write ``v |v|^(power-1) * 1_A``."""
        super().effective(weight, W, out)
        power_(out, self.power)

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102  (inherited)
        self._l2_now = self.l2 * share * scale
        super().before_step(optimizer, share, scale)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dv = (alpha dP outside of A, dP in it) power |v|^(power-1)`` and the penalty's ``l2 v``, on B alone."""
        A, B = (weight.matrix(weight.buffers[key]) for key in ("A", "B"))
        if self.current_alpha != 1:
            dP.mul_(_either(A, 1.0, self.current_alpha, dP))
        times_derivative_(dP, W, self.power)
        if self._l2_now:
            dP.addcmul_(W, _either(A, self._l2_now, self._l2_now / (1 - self.sparsity_target), dP))
        select.zero_outside_(dP, B)

    # ------------------------------------------------------------------ outside of B nothing moves

    def before_update(self, optimizer: Optimizer) -> None:
        """Keep the values of before the update, in the memory that P does not need meanwhile."""
        super().before_update(optimizer)
        entered = [weight for weight in self._groups[id(optimizer)].weights if weight.effective is not None]
        if entered and self.backward_sparsity:
            copy_each([cast(Tensor, weight.effective) for weight in entered], [weight.latent for weight in entered])

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """Undo the update outside of B, and find the sets anew if it is time; what enters B has a fresh state."""
        if not self.backward_sparsity:
            super().updated(optimizer, weights)
            return
        before = self._sets_of_updated()
        for part in weights if optimizer is None else self._groups[id(optimizer)].parts(weights):
            part.undo_outside("B")
        super().updated(optimizer, weights)
        if optimizer is not None:
            refresh(optimizer, self._groups[id(optimizer)].weights, "B", before)

    def written(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """Find the sets anew; what enters B has a fresh state."""
        before = self._sets_of_updated()
        super().written(optimizer, weights)
        refresh(optimizer, self._groups[id(optimizer)].weights, "B", before)

    def _sets_of_updated(self) -> dict[str, Tensor]:
        return {weight.name: weight.buffers["B"] for weight in self._weights.values()}


def _either(mask: Tensor, inside: float, outside: float, like: Tensor) -> Tensor:
    """Return the one number where ``mask`` is True and the other where it is False."""
    return torch.where(mask, like.new_full((), inside), like.new_full((), outside))
