"""DFBST: dynamic forward and backward sparse training (Pote et al., ACML 2023).

Sections 3.2-3.5. Decisions: ``d|t|/dt = +1`` at t = 0, else thresholds that start at 0 never move; the variance
penalty is that of the present step's gradient; "the whole model" is all weights of the optimizer that is stepping.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.optimizers import stepping
from lightning_sparse.compat.options import option
from lightning_sparse.compat.shards import local
from lightning_sparse.families.hard_threshold import HardThresholded
from lightning_sparse.families.latent import LatentCallback, LatentWeight
from lightning_sparse.families.target import Number
from lightning_sparse.families.thresholds import Granularity, ThresholdBuffer
from lightning_sparse.rules.parts import together
from lightning_sparse.trainer.updates import skips

__all__ = ["DFBST"]


class DFBST(HardThresholded, LatentCallback):
    r"""Dynamic Forward and Backward Sparse Training: trainable masks for weights and for their gradients.

    Forward, as :class:`DST` with ``|t_f|`` for ``t``. Backward, with ``G`` the gradient of ``W``: the contribution
    score ``CS = G / sum_j |G|`` of each row gives the mask ``M_b = 1[|CS| >= |t_b|]``, and ``W`` is updated with
    ``G~ = G * M_b``. ``alpha * sum exp(-t_f) + beta * std(G~ of the whole model)`` is added to the loss; the second
    term acts only on ``t_b``. With ``sparsity`` instead of ``alpha``, all ``t_f`` are shifted together to meet it.

    Example:
        >>> from lightning_sparse import DFBST
        >>> callback = DFBST(alpha=5e-6, beta=0.1)

    Reference:
        "Dynamic Forward and Backward Sparse Training (DFBST): Accelerated Deep Learning through Completely Sparse
        Training Schedule", ACML 2023.
    """

    alpha: float | None = option(
        default=None,
        kw_only=False,
        doc="weight of the forward regulariser, at least 0. Paper's values: 5e-4 (MNIST), 5e-6 (CIFAR). Give either it "
        "or ``sparsity``.",
    )
    beta: float = option(
        default=0.01,
        kw_only=False,
        check=partial(checks.at_least, 0, "Try beta=0.01; 0 leaves the backward pass dense."),
        doc="weight of the variance penalty, at least 0: the larger, the fewer gradients. Paper's values: 0.01, 0.1.",
    )
    penalty_from_epoch: int = option(
        default=0,
        check=partial(checks.integer, 0, "0 applies the penalty from the start."),
        doc="first epoch (from 0) with the variance penalty. The authors' program begins at 1.",
    )
    granularity: Granularity = option(
        default="neuron",
        doc='one pair of thresholds per output ``"neuron"`` (filter), per ``"layer"`` or per ``"weight"``.',
    )

    threshold_names = ("t", "t_b")
    sum_names = ("plain",)
    mask_names = ("M_b",)
    joins = True

    def __post_init__(self) -> None:
        """Begin with or without the variance penalty."""
        super().__post_init__()
        self._penalised = self.penalty_from_epoch == 0
        self._moments = torch.zeros(2, dtype=torch.float64)  # sum G~, sum G~^2
        self._by_optimizer = True  # t_b takes the optimizer's steps

    # ------------------------------------------------------------------ what users read

    @property
    def backward_masks(self) -> dict[str, Tensor]:
        """``M_b`` of the latest step by parameter name, of the weight's shape; all True before the first step."""
        return {name: weight.part.joined(weight.mask("M_b")) for name, weight in self._weights.items()}

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of ones in the ``M_b`` of each layer at the latest step."""
        return self.densities({name: weight.mask("M_b") for name, weight in self._weights.items()})

    @property
    def backward_density(self) -> float:
        """Share of ones in all ``M_b`` of the latest step."""
        return self.gradient_density

    @property
    def backward_thresholds(self) -> dict[str, Tensor]:
        """The thresholds ``t_b`` by parameter name."""
        return {name: weight.thresholds["t_b"].detach() for name, weight in self._weights.items()}

    @property
    def effective_thresholds(self) -> dict[str, Tensor]:
        """What ``|W|`` is compared with, by parameter name, and ``|G|``, by ``NAME/backward``."""
        backward = {f"{name}/backward": self.level(t) for name, t in self.backward_thresholds.items()}
        return {**super().effective_thresholds, **backward}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """Backward sparsity, to log."""
        return {"sparsity/backward": 1 - self.backward_density}

    # ------------------------------------------------------------------ the method

    def level(self, t: Number) -> Number:
        """``tau = |t|`` (Sec. 3.2)."""
        return abs(t)

    def shifted(self, t: float, by: float) -> float:
        """``|t|`` is what is compared, and stays at least 0."""
        return max(abs(t) + by, 0.0)

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Switch the variance penalty on when its time has come."""
        self._penalised = epoch >= self.penalty_from_epoch

    def before_step(self, optimizer: Optimizer, share: float, scale: float) -> None:  # noqa: D102  (inherited)
        self._moments.zero_()
        self._by_optimizer = self._target is None or isinstance(stepping(optimizer)[0], SGD)
        super().before_step(optimizer, share, scale)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """As DST with ``|t_f|``; then mask ``G`` by contribution (Sec. 3.3) and take the sums of the penalty."""
        t = weight.thresholds
        weight.kernels.hard_gradient(dP, W, t.tau, t.dtau["t"])
        self._moments = self._moments.to(dP.device)
        weight.kernels.backward_mask(
            dP, self.level(t.per_row("t_b")), weight.bits["M_b"], t.dtau["t_b"], t.dtau["plain"], self._moments
        )

    def threshold_gradients(self, buffer: ThresholdBuffer, share: float) -> None:
        """From ``|t_f|`` to ``t_f``; and the derivative of ``alpha sum exp(-t_f)``, unless they follow a plan."""
        t_f, dt_f = buffer.values["t"], buffer.gradients["t"]
        buffer.kernels.through_abs(dt_f, t_f)
        self.penalise(buffer, share)

    def finish_gradients(
        self, weights: Sequence[LatentWeight], buffers: Sequence[ThresholdBuffer], share: float
    ) -> None:
        """Give ``t_b`` the gradient of ``beta * std(G~)``, taken over all weights at once (Sec. 3.4)."""
        trained = [weight for weight in weights if weight.has_gradient]
        if not trained or not self._penalised:
            return
        N = sum(weight.size for weight in trained)
        self._moments = together(trained).sums(self._moments)
        for buffer in buffers:
            t_b, dt_b = buffer.values["t_b"], buffer.gradients["t_b"]
            buffer.kernels.variance_penalty(dt_b, buffer.gradients["plain"], self._moments, N, self.beta * share)
            buffer.kernels.through_abs(dt_b, t_b)
        for weight in trained if self._by_optimizer else ():
            weight.thresholds.hand_out("t_b")

    def updated(self, optimizer: Optimizer | None, weights: Sequence[LatentWeight]) -> None:
        """With a target, descend along the gradient of ``t_b`` itself where the optimizer would take out ``beta``."""
        if self._by_optimizer or optimizer is None or not self._penalised or skips(optimizer):
            return
        of = {id(weight.parameter): weight.thresholds for weight in weights if weight.frozen is None}
        for group in optimizer.param_groups:
            own = self.threshold_weight_decay
            decay = group.get("weight_decay", 0.0) if own is None else own
            for t in (of[id(p)] for p in group["params"] if id(p) in of):
                dt_b, t_b = t.gradients["t_b"].nan_to_num(0.0, 0.0, 0.0), local(t["t_b"])
                t_b.sub_(group["lr"] * dt_b.add_(t_b, alpha=decay))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to a step, and to its device."""
        return {**super().__getstate__(), "_moments": torch.zeros(2, dtype=torch.float64)}
