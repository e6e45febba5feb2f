"""TrainedScores: a score beside each latent weight, trained by plain SGD with the learning rate of its weight."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.optimizers import stepping
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["TrainedScores", "zeros"]


def zeros(latent: Tensor) -> Tensor:
    """Return scores of 0, in at least float32, since their steps are small."""
    return torch.zeros_like(latent, dtype=torch.promote_types(latent.dtype, torch.float32))


class TrainedScores:
    """The gradients of the scores ``S`` of one method, of the step under way.

    Args:
        key: of the scores, among the weights' buffers.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._dS: dict[str, Tensor] = {}

    def note(self, weights: Sequence[LatentWeight], rate: float) -> None:
        """Keep ``dS = r dP W`` until the update where there is a gradient; what is not finite counts as 0."""
        for weight in weights:
            if weight.has_gradient:
                dS = torch.mul(weight.gradient, weight.latent).to(weight.buffers[self.key].dtype).mul_(rate)
                self._dS[weight.name] = dS.nan_to_num_(0.0, 0.0, 0.0)

    def descend(self, optimizer: Optimizer, weights: Sequence[LatentWeight]) -> None:
        """``S <- S - lr dS`` for weights that have been updated, with the learning rate of that update."""
        of = {id(weight.parameter): weight for weight in weights}
        for group in (group for each in stepping(optimizer) for group in each.param_groups):
            for weight in (of[id(p)] for p in group["params"] if id(p) in of):
                lr = -group["lr"] if group.get("maximize") else group["lr"]
                weight.buffers[self.key].sub_(self._dS.pop(weight.name).mul_(lr))
