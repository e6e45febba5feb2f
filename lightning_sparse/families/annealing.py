"""Annealing: methods whose inactive weights get a share of their gradient that falls from epoch to epoch."""

from functools import partial

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import Options, option
from lightning_sparse.rules.schedules import Annealing, annealed
from lightning_sparse.trainer.readouts import Readouts

__all__ = ["Annealed"]


class Annealed(Options, Readouts):
    """A method with an annealed ``alpha_i = alpha * decay(i)`` in epoch i; it stands before the family in its bases."""

    alpha: float = option(default=1.0, doc="gradient scale of inactive weights at the start, in [0, 1].")
    decay: Annealing = option(
        default="none",
        doc='annealing of alpha: ``"none"``, ``"linear"``, ``"cosine"``, ``"sigmoid"``, ``"sigmoid_cosine"``, '
        '``"halving"`` or ``"exponential"``.',
    )
    decay_rate: float = option(
        default=1.0,
        check=partial(checks.at_least, 0, "The paper's value is 1."),
        doc="``beta`` of the exponential decay, per epoch, at least 0.",
    )

    def __post_init__(self) -> None:
        """Begin with the whole alpha."""
        super().__post_init__()
        self.current_alpha = self.alpha

    @property
    def extra_metrics(self) -> dict[str, float]:
        """The annealed alpha and backward sparsity, to log."""
        return {"sparsity/alpha": self.current_alpha, "sparsity/backward": 1 - self.gradient_density}

    def begin_epoch(self, epoch: int, epochs: int | None) -> None:
        """Anneal alpha."""
        self.current_alpha = annealed(self.alpha, self.decay, self.decay_rate, epoch, epochs)
