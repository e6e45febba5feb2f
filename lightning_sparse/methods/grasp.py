"""GraSP: picking winning tickets before training by preserving gradient flow (Wang et al., ICLR 2020).

Algorithm 1. Removing a weight changes the gradient flow ``g'g`` by about ``2 S``, ``S = -W * Hg``, so a large
``S`` marks a weight whose removal helps: the smallest stay, as in Algorithm 1 and the authors' program. ``absolute``
is the variant of Lubana and Dick (ICLR 2021): what changes the flow least, in either direction, goes.
"""

from functools import partial

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import option
from lightning_sparse.families.before_training import BeforeTraining
from lightning_sparse.trainer.curvature import differentiable_twice, dividing_logits, hessian_product
from lightning_sparse.trainer.probe import Probe, whole

__all__ = ["GraSP"]


class GraSP(BeforeTraining):
    """Gradient Signal Preservation: keep the connections whose removal would reduce the gradient's norm most.

    ``S = -W * Hg`` with the gradient ``g`` and the Hessian ``H`` of the mean loss of some batches, its logits divided
    by ``temperature``; the smallest ``S`` of the whole network stay.

    Example:
        >>> from lightning_sparse import GraSP
        >>> callback = GraSP(sparsity=0.95, batches=10)

    Reference:
        "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
    """

    batches: int = option(
        default=1,
        check=partial(checks.integer, 1, "About ten samples of each class are usual."),
        doc="number of training batches (of each process) whose loss is differentiated, 1 or more.",
    )
    absolute: bool = option(default=False, doc="keep the largest ``|S|`` instead.")
    temperature: float = option(
        default=200.0,
        check=partial(checks.above, 0, "The paper's value is 200; 1 leaves the logits as they are."),
        doc="the logits are divided by it, above 0; 1 leaves them as they are.",
    )
    logits: str | None = option(
        default=None,
        check=partial(checks.text, "It is the name of a submodule, such as 'net.head'."),
        doc='name of the submodule that returns the logits, such as ``"net.head"``; default: the module\'s own '
        "``forward``, which ``training_step`` then has to call as ``self(x)``.",
    )

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``-S = W * Hg``, or its magnitude."""
        with differentiable_twice(), dividing_logits(probe.module, self.logits, self.temperature):
            Hg = hessian_product(probe, self.batches, probe.gradient(self.batches))
        kept = [whole(W) * product for W, product in zip(probe.weights, Hg, strict=True)]
        return [score.abs() for score in kept] if self.absolute else kept
