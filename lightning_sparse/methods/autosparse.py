"""AutoSparse: learnable soft thresholds with gradient annealing (ICLR 2023 submission).

Equations 1-9; the forward function and the thresholds' own gradients are STR's. Decisions: alpha is annealed over the
Trainer's epochs; the set B of the explicit gradient sparsity is found anew at every step, per layer, and never smaller
than the active set A.
"""

import math
from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import Granularity, LatentWeight
from lightning_sparse.methods.str import STR
from lightning_sparse.rules.schedules import Annealing, annealed
from lightning_sparse.rules.select import top_k

__all__ = ["AutoSparse"]


class AutoSparse(STR):
    r"""AutoSparse: a learnable soft threshold per layer, with annealed gradients for the weights below it.

    With ``T = sigmoid(s)`` the layer computes with ``P = sign(W) max(|W| - T, 0)``. Backward, ``dW = dP * A`` and
    ``ds = -T (1 - T) sum dP sign(W) A``, where ``A`` is 1 for active weights and ``alpha_i`` for the others;
    ``alpha_i = alpha * decay(i)`` in epoch i. The optimizer's weight decay on ``s`` is what drives sparsity.

    Args:
        alpha: gradient scale of inactive weights at the start, from 0 (STR) to 1. Paper's values: 0.75 to 1; 0.4.
        decay: annealing: "none", "linear", "cosine", "sigmoid", "sigmoid_cosine" or "exponential".
        alpha_zero_epoch: alpha is 0 from this epoch (counted from 0) on, so that gradients are as sparse as weights.
        init_threshold: ``s`` at the start. Paper's values: -5; -7 for the Transformer.
        backward_density: compute weight gradients for this share of each layer only, its largest ``|W|`` (and always
            for the active ones); None: for all. Costs a selection of the k-th largest weight per layer and step.
        decay_rate: ``beta`` of the exponential decay, per epoch, at least 0.
        granularity: one threshold per ``"layer"`` (the paper's), per output ``"neuron"`` or per ``"weight"``.
        include: glob patterns on names of the weights to make sparse; see :class:`~lightning_sparse.SparseCallback`.
        exclude: glob patterns on names of weights that stay dense.
        log_every_n_steps: log also every so many optimizer steps; otherwise once an epoch.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: at fit start, if the decay needs the number of epochs and nothing bounds it.

    Example:
        >>> from lightning_sparse import AutoSparse
        >>> callback = AutoSparse(alpha=0.75, alpha_zero_epoch=90)

    Reference:
        "AutoSparse: Towards Automated Sparse Training", ICLR 2023 submission, Eqs. 1-9.
    """

    def __init__(
        self,
        alpha: float = 0.75,
        decay: Annealing = "sigmoid_cosine",
        alpha_zero_epoch: int | None = None,
        init_threshold: float = -5.0,
        backward_density: float | None = None,
        decay_rate: float = 1.0,
        granularity: Granularity = "layer",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(init_threshold, granularity, include, exclude, log_every_n_steps)
        checks.fraction("The paper's values are 0.75 to 1; 0 makes it STR.", alpha=alpha)
        checks.one_of(get_args(Annealing), decay=decay)
        checks.at_least(0, "The paper's value is 1.", decay_rate=decay_rate)
        if alpha_zero_epoch is not None:
            checks.integer(0, "None keeps annealing to the end.", alpha_zero_epoch=alpha_zero_epoch)
        if backward_density is not None:
            checks.fraction("None computes every weight's gradient.", backward_density=backward_density)
        self.alpha = alpha
        self.decay = decay
        self.alpha_zero_epoch = alpha_zero_epoch
        self.backward_density = backward_density
        self.decay_rate = decay_rate
        self.current_alpha = alpha

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of each layer's weights that receive a gradient: B, all, or once alpha is 0, the active ones."""
        if self.current_alpha == 0:
            return self.layer_density
        if self.backward_density is None:
            return dict.fromkeys(self._weights, 1.0)
        return {name: max(self.backward_density, density) for name, density in self.layer_density.items()}

    @property
    def watched(self) -> dict[str, float]:
        """The annealed alpha and backward sparsity, to log."""
        return {"sparsity/alpha": self.current_alpha, "sparsity/backward": 1 - self.gradient_density}

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Anneal alpha (Eqs. 2-4, 9)."""
        if self.alpha_zero_epoch is not None and epoch >= self.alpha_zero_epoch:
            self.current_alpha = 0.0
            return
        self.current_alpha = annealed(self.alpha, self.decay, self.decay_rate, epoch, epochs)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP A`` and ``dT = -sum dP sign(W) A`` (Eq. 1), outside of B nothing (Eq. 8)."""
        if self.backward_density is not None:
            dP.mul_(_largest(W.abs(), weight.tau, self.backward_density))
        weight.kernels.soft_gradient(dP, W, weight.tau, weight.dtau["t"], self.current_alpha)


def _largest(magnitude: Tensor, T: Tensor, density: float) -> Tensor:
    """Return B: the share ``density`` of largest magnitudes, at least all above ``T``."""
    active = magnitude > T
    k = round(density * magnitude.numel())
    return active if int(active.sum()) >= k else top_k(magnitude.masked_fill_(active, math.inf), k)
