r"""DeepR: deep rewiring (Bellec et al., ICLR 2018).

Algorithm 1, with a fixed number of connections in each layer as in the authors' program, or in the whole network.
Decisions: a position's sign is that of its initial weight (at random where that is 0); the L1 term and the noise are
applied after the optimizer's own update, with its learning rate, so any optimizer will do; new connections start with
1e-12 of their sign, the program's value; those that were just dropped are not drawn again unless no other place is
left.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.rules import sampling, select
from lightning_sparse.rules.budgets import Scope
from lightning_sparse.weights.base import Weight, finite

__all__ = ["DeepR"]

NEW = 1e-12


class DeepR(MaskedCallback):
    r"""Deep Rewiring: every position has a fixed sign, and a connection that would change it moves elsewhere.

    With ``theta = sign W`` of active connections, after each update of the optimizer ``theta -= lr l1``,
    ``theta += sqrt(2 lr T) nu`` with standard normal ``nu``; where ``theta < 0`` the connection is dropped, and as many
    are grown at random.

    Args:
        sparsity: share of zeros over all selected weights, in [0, 1).
        l1: the paper's alpha, weight of the L1 term, at least 0.
        temperature: the paper's T, at least 0; 0 adds no noise. The default gives the authors' noise, of standard
            deviation 1e-5 times the learning rate, at their learning rate 0.5.
        scope: grow in the same ``"layer"``, or anywhere (``"global"``).
        options: ``distribution``, ``min_layer_density``, ``seed``, ``include``, ``exclude``, ``log_every_n_steps``; see
            :class:`~lightning_sparse.families.masked.MaskedCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import DeepR
        >>> callback = DeepR(sparsity=0.98, l1=1e-4)

    Reference:
        "Deep Rewiring: Training very sparse deep networks", ICLR 2018.
    """

    def __init__(
        self,
        sparsity: float,
        l1: float = 1e-5,
        temperature: float = 2.5e-11,
        scope: Scope = "layer",
        **options: Any,
    ) -> None:
        super().__init__(sparsity, **options)
        checks.at_least(0, "The authors' value is 1e-5.", l1=l1)
        checks.at_least(0, "0 adds no noise.", temperature=temperature)
        checks.one_of(get_args(Scope), scope=scope)
        self.l1 = l1
        self.temperature = temperature
        self.scope = scope
        self._stepping: set[str] = set()

    @property
    def connections(self) -> dict[str, Tensor]:
        """Nothing to go by: connections may move at every step."""
        return {}

    def new_buffers(self, weight: Weight) -> dict[str, Tensor]:
        """Fix the signs."""
        at_random = torch.rand(weight.mask.shape, generator=self.generator).to(weight.W.device) < 0.5
        return {"positive": torch.where(weight.W == 0, at_random, weight.W > 0)}

    def observe(self, weights: Sequence[Weight], scale: float) -> None:
        """Note which weights the step that follows updates: none if AMP skips it."""
        if finite(weights):
            self._stepping.update(weight.name for weight in weights)

    def updated(self, weights: Sequence[Weight]) -> None:
        """Decay, shake, and move the connections whose sign has changed."""
        weights = [weight for weight in weights if weight.name in self._stepping]
        self._stepping.difference_update(weight.name for weight in weights)
        lost = [self.drift(weight) for weight in weights]
        drops = list(map(select.count, lost))
        grows = drops if self.scope == "layer" else self.anywhere(weights, drops)
        for weight, leaving, fewer, more in zip(weights, lost, drops, grows, strict=True):
            if fewer or more:
                new, dropped = min(more, weight.room), weight.places[leaving]
                grown = sampling.free_positions(new, weight.positions, weight.size, self.generator)
                again = torch.randperm(fewer, generator=self.generator)[: more - new]
                grown = torch.cat((grown.to(dropped.device), dropped[again.to(dropped.device)]))
                weight.exchange(dropped, grown, NEW * signs(weight, grown))

    def drift(self, weight: Weight) -> Tensor:
        """``theta -= lr l1`` and ``theta += sqrt(2 lr T) nu``; return which active connections are below 0 now."""
        lr, W = float(weight.group["lr"]), weight.W.reshape(-1)[weight.places]
        sign = signs(weight, weight.places)
        W -= lr * self.l1 * sign
        if self.temperature:
            noise = torch.randn(len(W), generator=self.generator) * math.sqrt(2 * lr * self.temperature)
            W += noise.to(W)
        select.put_(weight.W, weight.places, W)
        return W * sign < 0

    def anywhere(self, weights: Sequence[Weight], drops: Sequence[int]) -> list[int]:
        """Draw how many connections each layer gets of all that were dropped."""
        grows = [max(0, self.least(w) - (w.active - n)) for w, n in zip(weights, drops, strict=True)]
        room = [weight.room for weight in weights]
        with_own = [places + n for places, n in zip(room, drops, strict=True)]
        for places in (room, with_own):  # the places that were just left come last
            open_ = [max(0, n - taken) for n, taken in zip(places, grows, strict=True)]
            extra = drawn(min(sum(drops) - sum(grows), sum(open_)), open_, self.generator)
            grows = [n + more for n, more in zip(grows, extra, strict=True)]
        return grows


def signs(weight: Weight, places: Tensor) -> Tensor:
    """Return the signs that go with some flat positions, 1 or -1."""
    return weight.buffers["positive"].reshape(-1)[places].to(weight.W.dtype).mul_(2).sub_(1)


def drawn(n: int, places: Sequence[int], generator: Generator) -> list[int]:
    """Return how many of ``n`` draws without replacement fall to each of the groups of ``places``."""
    if n <= 0:
        return [0] * len(places)
    ends = torch.tensor(places).cumsum(0)
    positions = torch.randperm(int(ends[-1]), generator=generator)[:n]
    owners = torch.bucketize(positions, ends, right=True)
    counts: list[int] = torch.bincount(owners, minlength=len(places)).tolist()
    return counts
