"""DFBST: dynamic forward and backward sparse training (Pote et al., ACML 2023).

Sections 3.2-3.5. Decisions: ``d|t|/dt = +1`` at t = 0, else thresholds that start at 0 never move; the variance
penalty is that of the present step's gradient; "the whole model" is all weights of the optimizer that is stepping.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.families.latent import Granularity, LatentCallback, LatentWeight, Pool

__all__ = ["DFBST"]


class DFBST(LatentCallback):
    r"""Dynamic Forward and Backward Sparse Training: trainable masks for weights and for their gradients.

    Forward, as :class:`DST` with ``|t_f|`` for ``t``. Backward, with ``G`` the gradient of ``W``: the contribution
    score ``CS = G / sum_j |G|`` of each row gives the mask ``M_b = 1[|CS| >= |t_b|]``, and ``W`` is updated with
    ``G~ = G * M_b``. The loss gains ``alpha * sum exp(-t_f) + beta * std(G~ of the whole model)``; the second term
    reaches ``t_b`` alone.

    Args:
        alpha: weight of the forward regulariser, at least 0. Paper's values: 5e-4 (MNIST), 5e-6 (CIFAR).
        beta: weight of the variance penalty, at least 0: the larger, the fewer gradients. Paper's values: 0.01, 0.1.
        penalty_from_epoch: first epoch (from 0) with the variance penalty. The authors' program begins at 1.
        granularity: one pair of thresholds per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``.
        reset_above: collapse guard: a layer with more than this share masked has its forward thresholds set to 0;
            None switches the guard off.
        include: glob patterns on names of the weights to make sparse; see :class:`~lightning_sparse.SparseCallback`.
        exclude: glob patterns on names of weights that stay dense.
        log_every_n_steps: log also every so many optimizer steps; otherwise once an epoch.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import DFBST
        >>> callback = DFBST(alpha=5e-6, beta=0.1)

    Reference:
        "Dynamic Forward and Backward Sparse Training (DFBST): Accelerated Deep Learning through Completely Sparse
        Training Schedule", ACML 2023.
    """

    threshold_names = ("t", "t_b")
    sum_names = ("plain",)
    mask_names = ("M_b",)

    def __init__(
        self,
        alpha: float,
        beta: float,
        penalty_from_epoch: int = 0,
        granularity: Granularity = "neuron",
        reset_above: float | None = 0.99,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(0.0, granularity, include, exclude, log_every_n_steps)
        checks.at_least(0, "Try alpha=5e-4 for a small network, 5e-6 for a deep one.", alpha=alpha)
        checks.at_least(0, "Try beta=0.01; 0 leaves the backward pass dense.", beta=beta)
        checks.integer(0, "0 applies the penalty from the start.", penalty_from_epoch=penalty_from_epoch)
        if reset_above is not None:
            checks.fraction("The paper's value is 0.99; None switches the guard off.", reset_above=reset_above)
        self.alpha = alpha
        self.beta = beta
        self.penalty_from_epoch = penalty_from_epoch
        self.reset_above = reset_above
        self._penalised = penalty_from_epoch == 0
        self._moments = torch.zeros(2, dtype=torch.float64)  # sum G~, sum G~^2

    @property
    def backward_masks(self) -> dict[str, Tensor]:
        """``M_b`` of the latest step by parameter name, of the weight's shape; all True before the first step."""
        return {name: weight.mask("M_b") for name, weight in self._weights.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of ones in the ``M_b`` of each layer at the latest step."""
        return {name: int(mask.count_nonzero()) / mask.numel() for name, mask in self.backward_masks.items()}

    @property
    def backward_density(self) -> float:
        """Share of ones in all ``M_b`` of the latest step."""
        return self.gradient_density

    @property
    def backward_thresholds(self) -> dict[str, Tensor]:
        """The thresholds ``t_b`` by parameter name."""
        return {name: weight.thresholds["t_b"].detach() for name, weight in self._weights.items()}

    @property
    def levels(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, by parameter name, and ``|G|``, by ``NAME/backward``."""
        backward = {f"{name}/backward": self.level(t) for name, t in self.backward_thresholds.items()}
        return {**super().levels, **backward}

    @property
    def watched(self) -> dict[str, float]:
        """Backward sparsity, to log."""
        return {"sparsity/backward": 1 - self.backward_density}

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Switch the variance penalty on when its time has come."""
        self._penalised = epoch >= self.penalty_from_epoch

    def level(self, t: Tensor) -> Tensor:
        """``tau = |t|`` (Sec. 3.2)."""
        return t.abs()

    def effective(self, weight: LatentWeight, W: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``W * 1[|W| > |t_f|]`` (Sec. 3.2)."""
        passing: int | Tensor = weight.kernels.hard_project(W, weight.tau, out)
        return passing

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102
        self._moments.zero_()
        super().before_step(optimizer, share, scale)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to a step, and to its device."""
        return {**super().__getstate__(), "_moments": torch.zeros(2, dtype=torch.float64)}

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """As DST with ``|t_f|``; then mask ``G`` by contribution (Sec. 3.3) and take the sums of the penalty."""
        weight.kernels.hard_gradient(dP, W, weight.tau, weight.dtau["t"])
        tau_b, weighted, plain = self.level(weight.per_row("t_b")), weight.dtau["t_b"], weight.dtau["plain"]
        self._moments = self._moments.to(dP.device)
        weight.kernels.backward_mask(dP, tau_b, weight.bits["M_b"], weighted, plain, self._moments)

    def threshold_gradients(self, pool: Pool, share: float) -> bool:
        """From ``|t_f|`` to ``t_f``; and the derivative of ``alpha sum exp(-t_f)``."""
        t_f, dt_f = pool.values["t"], pool.gradients["t"]
        pool.kernels.through_abs(dt_f, t_f)
        pool.kernels.exponential_penalty(dt_f, t_f, self.alpha * share)
        return True

    def finish_gradients(self, pools: Sequence[Pool], share: float) -> None:
        """Give ``t_b`` the gradient of ``beta * std(G~)``, taken over all weights at once (Sec. 3.4)."""
        weights = [weight for pool in pools for weight in pool.weights if weight.has_gradient]
        if not weights or not self._penalised:
            return
        N = sum(weight.latent.numel() for weight in weights)
        for pool in pools:
            t_b, dt_b = pool.values["t_b"], pool.gradients["t_b"]
            pool.kernels.variance_penalty(dt_b, pool.gradients["plain"], self._moments, N, self.beta * share)
            pool.kernels.through_abs(dt_b, t_b)
        for weight in weights:
            weight.thresholds["t_b"].grad = weight.gradients["t_b"]
