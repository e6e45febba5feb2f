"""CHT: Cannistraci-Hebb training (Zhang et al., ICLR 2024), and its soft form CHTs (Zhang et al., NeurIPS 2025).

A layer is a bipartite graph of inputs and outputs. An update removes the links of least importance,

    S_ij = alpha |W_ij| + (1 - alpha) RI_ij,    RI_ij = |W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|

(CHTs, Eqs. 1 and 2), and grows as many that the graph that is left predicts. The score of a missing link ``(u, v)`` is

    CH3-L3p(u, v) = sum over paths u - z1 - z2 - v of 1 / sqrt(e*_z1 e*_z2)     (CHT; CHTs, Appendix C)
    CH2-L3n(u, v) = sum over the nodes z of these paths of i_z / e*_z           (CHTs, Eq. 3, as in its program)

where ``i_z`` and ``e_z`` are the numbers of links of z within and out of the local community, and ``e* = 1 + e``. CHT
takes what is least and what is largest. CHTs draws both: links stay with probabilities in proportion to ``S^T``, with T
from 1 to 3, and are grown in proportion to their scores. Decisions: a link that is removed and predicted again stays as
it is, as in the authors' program; T grows with the way to the last update; only matrices are graphs, and the
connections of other weights, such as convolutions, are grown at random; inactive neurons keep their links.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.compat.options import option
from lightning_sparse.families.masked import DenseOnly
from lightning_sparse.families.prune_and_grow import PruneAndGrow
from lightning_sparse.rules import ascending, criteria, sampling, select
from lightning_sparse.rules.link_prediction import PREDICTORS, Predictor, num_paths
from lightning_sparse.trainer.guards import listed
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.group import WeightGroup

__all__ = ["CHT"]

#: paths in a layer that take a minute or more to go through
_MANY_PATHS = 5e8


class CHT(DenseOnly, PruneAndGrow):
    """Cannistraci-Hebb Training: drop small weights, grow the links that paths of length three predict; no gradient.

    With ``soft=True`` it is CHTs: links are drawn by their importance and by their scores.

    Example:
        >>> from lightning_sparse import CHT
        >>> callback = CHT(sparsity=0.99)
        >>> callback = CHT(sparsity=0.95, soft=True, predictor="CH2-L3n")  # CHTs, for wide layers

    Reference:
        "Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory for ultra-sparse
        advantage in deep learning", ICLR 2024; "Brain network science modelling of sparse neural networks enables
        Transformers and LLMs to perform as fully connected", NeurIPS 2025 (CHTs).
    """

    soft: bool = option(default=False, doc="draw what goes and what comes, in proportion to importance and scores.")
    predictor: Predictor = option(
        default="CH3-L3p",
        doc='how missing links are scored: ``"CH3-L3p"`` goes through all paths, which is quick at a density of some '
        'per cent; ``"CH2-L3n"`` multiplies matrices, whatever the density.',
    )
    alpha: float = option(
        default=1.0,
        check=partial(checks.fraction, "The authors use 1, magnitude, or 0, relative importance."),
        doc="share of ``|W|`` in the importance, in [0, 1]; the rest is relative importance, which favours neurons "
        "with few connections.",
    )

    paper_update_every = None
    unfit_patterns = dict.fromkeys(("N:M", "block", "row"), "paths predict single links. Use SET or RigL.")

    @property
    def needs_whole_weights(self) -> str | None:
        """Paths go through all rows."""
        return "Use SET or RigL, or strategy='ddp'."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._temperature = 1.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that there is a graph, and tell of weights that are none."""
        super().on_train_start(trainer, pl_module)
        others = [weight.name for weight in self._weights.values() if len(weight.shape) != 2]
        if len(others) == len(self._weights):
            raise MisconfigurationException(
                f"{self!r} predicts links between the inputs and the outputs of matrices, but {listed(others)} are "
                "none. Include linear layers, or use SET, which grows connections at random."
            )
        if others:
            self.warn_once(
                f"{self!r} grows some connections at random, as SET does: it predicts links of matrices only, and "
                f"{listed(others)} are none. Leave them dense with exclude, if you do not want that."
            )

    def move(self, weights: Sequence[Weight], group: WeightGroup, scale: float) -> None:
        """Move connections, at the temperature of now."""
        tick = self._epoch if self._every is None else group.step
        self._temperature = 1 + 2 * min(tick / self.clock.end, 1.0)
        super().move(weights, group, scale)

    def rewire(self, weights: Sequence[Weight], drops: Sequence[int], scale: float) -> None:
        """Move so many connections of each layer, but for those that are removed and predicted again."""
        for weight, n in zip(weights, drops, strict=True):
            if not n:
                continue
            removed = self.drop(weight, n, scale).cpu()
            predicted = self.grow(weight, n, removed).cpu()
            dropped = removed[~ascending.contains(predicted, removed)]
            weight.rewire(dropped, predicted[~ascending.contains(removed, predicted)], self.new_value)

    def drop_scores(self, weight: Weight, scale: float) -> Tensor:
        """Return the importance ``S``, or draws that are large with probabilities in proportion to ``S^T``."""
        S = self.alpha * criteria.magnitude(weight)
        if self.alpha < 1:
            S = S + (1 - self.alpha) * criteria.relative_importance(weight)
        return sampling.race(S.double() ** self._temperature, self.generator) if self.soft else S

    def grow(self, weight: Weight, n: int, dropped: Tensor) -> Tensor:
        """Grow the links of largest score in the graph without what is dropped, or draw them by their scores."""
        if len(weight.shape) != 2:
            return self.pattern.grow_at_random(weight, n, dropped, self.generator)
        left = weight.mask.clone()
        select.put_(left, dropped.to(left.device), False)
        scores = self._scores(weight.name, left)
        if self.soft:
            scores = sampling.race(scores, self.generator)
        return select.top_k_positions(scores, n, among=~left.to(scores.device))

    def _scores(self, name: str, links: Tensor) -> Tensor:
        """Return the scores of the links that are missing."""
        if self.predictor == "CH3-L3p" and (paths := num_paths(links)) > _MANY_PATHS:
            self.warn_once(
                f"{self!r} goes through many paths in each update: {paths:.2g} in {name}. Use predictor='CH2-L3n', "
                "which multiplies matrices, or a higher sparsity."
            )
        return PREDICTORS[self.predictor](links)
