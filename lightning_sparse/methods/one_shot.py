"""OneShot: prune a trained network at once, and train what is left (Han et al., NeurIPS 2015; Wanda, Sun et al., 2023).

Magnitude pruning keeps the largest ``|W_ij|``. Wanda (arXiv 2306.11695, Eq. 1) keeps the largest

    S_ij = |W_ij| ||X_j||_2

of each output i, where ``X_j`` is input j of all samples and tokens. Decisions: the norm is taken over the batches of
all processes, and divided by the square root of the number of rows of ``X``, which changes no order within a layer; a
convolution's ``X`` has a row for each patch that a filter sees, so each input channel has a norm for each
place of the kernel; the network runs in evaluation mode, as it would be used; every layer has the same sparsity, and
every output of a layer, give or take one connection.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.before_training import BeforeTraining, of_units, of_weights
from lightning_sparse.families.common import DISTRIBUTION, check_distribution
from lightning_sparse.families.shares import floors, unit_counts
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, budget
from lightning_sparse.rules.rows import top_k_of_rows
from lightning_sparse.trainer.calibration import FEW_BATCHES, few_batches, input_norms, times_input_norms
from lightning_sparse.trainer.probe import Probe, whole

__all__ = ["OneShot"]

Criterion = Literal["magnitude", "wanda"]
Competition = Literal["global", "layer", "output"]


class OneShot(BeforeTraining):
    """Prune a trained network at once when training begins; the weights that stay keep their values and are trained.

    The mask does not change after that. ``"wanda"`` weighs each ``|W|`` with the norm of the inputs that it meets in
    some batches of the training data.

    Example:
        >>> from lightning_sparse import OneShot
        >>> callback = OneShot(sparsity=0.5, criterion="wanda")

    Reference:
        "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; "A Simple and Effective
        Pruning Approach for Large Language Models", ICLR 2024 (Wanda).
    """

    criterion: Criterion = option(
        default="magnitude",
        doc='what stays: the largest ``|W|`` (``"magnitude"``), or the largest ``|W| ||X||`` (``"wanda"``).',
    )
    scope: Competition | None = option(
        default=None,
        doc='which weights compete: those of all layers (``"global"``), of each ``"layer"``, or of each ``"output"``. '
        "Default: global for magnitudes, and for Wanda the outputs, as in the papers, or with a pattern the layer.",
    )
    distribution: Distribution | Mapping[str, float] = option(
        default="uniform", check=check_distribution, doc=f'unless ``scope`` is ``"global"``, {DISTRIBUTION}'
    )
    calibration_batches: int | None = option(
        default=None,
        check=partial(checks.integer, 1, "128 samples are enough in the paper."),
        doc=f"number of training batches (of each process) that Wanda's norms are taken over; default: {FEW_BATCHES}.",
    )
    scale_init: bool = fixed(default=False)  # the network is trained

    needs_loss = False

    def __post_init__(self) -> None:
        """Check that batches are for something."""
        super().__post_init__()
        if self.criterion == "magnitude" and self.calibration_batches is not None:
            raise ValueError(
                f"calibration_batches is for criterion='wanda', got {self.calibration_batches!r} with "
                "criterion='magnitude', which looks at no data. Leave it out."
            )
        if self.scope == "output" and self.pattern.kind != "unstructured":
            raise ValueError(
                f"scope must be 'layer' or 'global' with pattern={self.pattern_name!r}, got 'output': as many "
                "connections of each output may not have the pattern. Leave it out, or use 'layer'."
            )

    @property
    def runs_network(self) -> bool:
        """Wanda's scores call ``training_step``."""
        return self.criterion == "wanda"

    @property
    def needs_whole_weights(self) -> str | None:
        """Scores are of a copy of the network; magnitudes can be had without one."""
        starts = {"global": "'global_magnitude'", "layer": f"'magnitude', distribution={self.distribution!r}"}
        if self.criterion == "wanda" or self.competition not in starts:
            return super().needs_whole_weights
        return f"Use RandomPruning(initial={starts[self.competition]}), which keeps the same weights."

    @property
    def competition(self) -> Competition:
        """Which weights compete: what ``scope`` says, or the criterion's own."""
        if self.scope is not None:
            return self.scope
        if self.criterion == "magnitude":
            return "global"
        return "output" if self.pattern.kind == "unstructured" else "layer"

    def scores(self, probe: Probe) -> list[Tensor]:
        """Return ``|W|``, or ``|W|`` times the norms of the inputs."""
        magnitudes = [whole(W).abs() for W in probe.weights]
        if self.criterion == "magnitude":
            return magnitudes
        norms = input_norms(self, probe, few_batches(probe, self.calibration_batches))
        named = zip(probe.names, magnitudes, strict=True)
        return [times_input_norms(W, norms[name]) if name in norms else W for name, W in named]

    def choose_masks(self, probe: Probe) -> list[Tensor]:
        """Keep the largest scores of all layers, or as many of each layer as ``distribution`` gives."""
        weights = self.units([self._weights[name] for name in probe.names])
        scores = [of_units(weight, score) for weight, score in zip(weights, self.finite_scores(probe), strict=True)]
        ranked = [select.first_of_rows(score, weight.nonempty) for score, weight in zip(scores, weights, strict=True)]
        total = budget(self.sparsity_target, sum(weight.size for weight in weights))
        if self.competition == "global":
            at_least = floors(weights, self.min_layer_density, total)
            everywhere = [torch.ones_like(score, dtype=torch.bool) for score in scores]
            counts = self.pattern.count_global_top_k(weights, ranked, total, everywhere, at_least)
        else:
            shares = unit_counts(weights, self.pattern, self.distribution, total, self.min_layer_density)
            counts = [shares[weight.name] for weight in weights]
        if self.competition == "output":
            each = zip(scores, counts, weights, strict=True)
            return [top_k_of_rows(score, k, weight.outputs) for score, k, weight in each]
        return of_weights(weights, [self.pattern.top_k(*each) for each in zip(weights, ranked, counts, strict=True)])
