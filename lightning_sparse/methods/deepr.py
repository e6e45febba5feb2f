r"""DeepR: deep rewiring (Bellec et al., ICLR 2018).

Algorithm 1, with a fixed number of connections in each layer as in the authors' program, or in the whole network.
Decisions: a position's sign is that of its initial weight (at random where that is 0); the L1 term and the noise are
applied after the optimizer's own update, with its learning rate, so any optimizer will do; new connections start with
1e-12 of their sign, the program's value; those that were just dropped are not drawn again unless no other place is
left.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.options import option
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.shares import drawn_anywhere
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Scope
from lightning_sparse.rules.parts import together
from lightning_sparse.trainer.guards import listed
from lightning_sparse.weights.base import Weight, param_group
from lightning_sparse.weights.masked import MaskedWeight, dense, finite_gradients

__all__ = ["DeepR"]

NEW = 1e-12


class DeepR(DenseOnly, MaskedCallback):
    r"""Deep Rewiring: every weight has a fixed sign; a connection that would change it is dropped, and another grows.

    With ``theta = sign W`` of active connections, after each update of the optimizer ``theta -= lr l1``,
    ``theta += sqrt(2 lr T) nu`` with standard normal ``nu``; where ``theta < 0`` the connection is dropped, and as many
    are grown at random.

    Example:
        >>> from lightning_sparse import DeepR
        >>> callback = DeepR(sparsity=0.98, l1=1e-4)

    Reference:
        "Deep Rewiring: Training very sparse deep networks", ICLR 2018.
    """

    l1: float = option(
        default=1e-5,
        check=partial(checks.at_least, 0, "The authors' value is 1e-5."),
        doc="the paper's alpha, weight of the L1 term, at least 0.",
    )
    temperature: float = option(
        default=2.5e-11,
        check=partial(checks.at_least, 0, "0 adds no noise."),
        doc="the paper's T, at least 0; 0 adds no noise. The default gives the authors' noise, of standard deviation "
        "1e-5 times the learning rate, at their learning rate 0.5.",
    )
    scope: Scope = option(default="layer", doc='grow in the same ``"layer"``, or anywhere (``"global"``).')

    unfit_patterns = dict.fromkeys(
        ("N:M", "block", "row"), "a connection is dropped when its own weight changes its sign. Use SET or RigL."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stepping: set[str] = set()

    @property
    def mask_versions(self) -> dict[str, int]:
        """Nothing to go by: connections may move at every step."""
        return {}

    def refuse_choices(self, choices: Sequence[ParameterChoice]) -> None:
        """Raise if rows must not be empty: connections that move begin so near 0 that a row's norm is."""
        super().refuse_choices(choices)
        names = [choice.name for choice in choices if choice.nonempty is not None]
        if names:
            raise MisconfigurationException(
                f"{self!r} moves connections to values of {NEW}, but each row of {listed(names)} is divided by its "
                "norm, as by weight_norm. Leave it dense with exclude, or take another method, such as SET."
            )

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Fix the signs."""
        (held,) = dense([weight])
        at_random = held.part.rand(held.mask.shape, self.generator).to(held.W.device) < 0.5
        return {"positive": torch.where(held.W == 0, at_random, held.W > 0)}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """Note which weights the step that follows updates: none if AMP skips it."""
        if finite_gradients(dense(weights)):
            self._stepping.update(weight.name for weight in weights)

    def updated(self, weights: Sequence[Weight]) -> None:
        """Decay, shake, and move the connections whose sign has changed."""
        moving = dense([weight for weight in weights if weight.name in self._stepping])
        self._stepping.difference_update(weight.name for weight in moving)
        lost = [self.drift(weight) for weight in moving]
        drops = together(moving).total(*map(select.count, lost))
        grows = drops if self.scope == "layer" else self.anywhere(moving, drops)
        for weight, leaving, fewer, more in zip(moving, lost, drops, grows, strict=True):
            if fewer or more:
                new, dropped = min(more, weight.num_inactive), weight.active_indices[leaving]
                grown = self.pattern.grow_at_random(weight, new, dropped, self.generator)
                again = torch.randperm(fewer, generator=self.generator)[: more - new]
                grown = torch.cat((grown.to(dropped.device), weight.part.taken(dropped, again)))
                weight.rewire(dropped, grown, NEW * signs(weight, grown))

    def drift(self, weight: MaskedWeight) -> Tensor:
        """``theta -= lr l1`` and ``theta += sqrt(2 lr T) nu``; return which active connections are below 0 now."""
        places = weight.active_indices
        indices = weight.part.indices(places)
        lr, W = float(param_group(weight)["lr"]), weight.W.reshape(-1)[indices]
        sign = signs(weight, places)
        W -= lr * self.l1 * sign
        if self.temperature:
            noise = weight.part.drawn_for(places, partial(torch.randn, generator=self.generator))
            W += (noise * math.sqrt(2 * lr * self.temperature)).to(W)
        select.put_(weight.W, indices, W)
        return W * sign < 0

    def anywhere(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Draw how many connections each layer gets of all that were dropped."""
        return drawn_anywhere(weights, drops, self.min_layer_density, self.generator)


def signs(weight: MaskedWeight, places: Tensor) -> Tensor:
    """Return the signs that go with some flat positions, 1 or -1."""
    positive = weight.buffers["positive"].reshape(-1)[weight.part.indices(places)]
    return positive.to(weight.W.dtype).mul_(2).sub_(1)
