"""DFBST: dynamic forward and backward sparse training (Pote et al., ACML 2023).

Sections 3.2-3.5. Decisions: ``d|t|/dt = +1`` at t = 0, else thresholds that start at 0 never move; the variance
penalty is that of the present step's gradient; "the whole model" is all weights of the optimizer that is stepping.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse import checks, kernels
from lightning_sparse.latent import Granularity, LatentCallback, LatentWeight
from lightning_sparse.layers import write_matrix

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
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def backward_masks(self) -> dict[str, Tensor]:
        """``M_b`` of the latest step by parameter name, of the weight's shape; all True before the first step."""
        return {name: weight.buffers["M_b"].detach() for name, weight in self._weights.items()}

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
    def watched(self) -> dict[str, float]:
        """Backward sparsity, to log."""
        return {"sparsity/backward": 1 - self.backward_density}

    def new_buffers(self, latent: Tensor) -> dict[str, Tensor]:
        """Begin with a dense ``M_b``."""
        return {"M_b": torch.ones_like(latent, dtype=torch.bool)}

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Switch the variance penalty on when its time has come."""
        self._penalised = epoch >= self.penalty_from_epoch

    def effective(self, W: Tensor, t: Tensor, out: Tensor) -> int | Tensor | None:
        """Write ``W * 1[|W| > |t_f|]`` (Sec. 3.2)."""
        tau = t.abs()
        passing: int | Tensor = kernels.for_tensors(W, tau).hard_project(W, tau, out)
        return passing

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor, t: Tensor) -> Tensor:
        """As DST with ``|t_f|``; then mask ``G`` by contribution (Sec. 3.3) and note the sums of the penalty."""
        tau = t.abs()
        dtau: Tensor = kernels.for_tensors(dP, tau).hard_gradient(dP, W, tau)
        tau_b = weight.per_row("t_b").abs()
        M_b = weight.matrix(weight.buffers["M_b"])
        self._sums[weight.name] = kernels.for_tensors(dP, tau_b).backward_mask(dP, tau_b, M_b)
        write_matrix(weight.buffers["M_b"], M_b, weight.transposed_groups)
        return dtau * _sign(t)

    def finish_gradients(self, weights: Sequence[LatentWeight], share: float) -> None:
        """Give ``t_b`` the gradient of ``beta * std(G~)``, taken over all weights at once (Sec. 3.4).

        With N elements, mean m and unbiased standard deviation s of ``G~``: ``dL_v/dM_b = (G~ - m) G / ((N-1) s)`` and
        ``dL_v/dt_b = -sum_j dL_v/dM_b H(d_b) sign(t_b)``. Two sums a row and two a model are all it needs.
        """
        sums = [self._sums.pop(weight.name) for weight in weights]
        if not self._penalised:
            return
        N = sum(weight.latent.numel() for weight in weights)
        first, second = torch.stack([moments for _, _, moments in sums]).sum(0)
        m = first / N
        s = ((second - N * m * m).clamp_min(0) / (N - 1)).sqrt()
        factor = torch.where(s > 0, -self.beta * share / ((N - 1) * s), 0.0)
        for weight, (weighted, plain, _) in zip(weights, sums, strict=True):
            dL = weighted.sub_(plain.mul_(m)).mul_(factor)
            weight.thresholds["t_b"].grad = weight.fold(dL.mul_(_sign(weight.per_row("t_b"))), "t_b")

    def penalty_gradient(self, t: Tensor) -> Tensor:
        """Derivative of ``alpha sum exp(-t_f)``."""
        return torch.neg(t).exp_().mul_(-self.alpha)


def _sign(t: Tensor) -> Tensor:
    """Derivative of ``|t|``, +1 at 0."""
    return torch.where(t < 0, -1.0, 1.0).to(t.dtype)
