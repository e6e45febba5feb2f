"""NOfMCallback: dense latent weights, of which the layers compute with N of every M neighbouring inputs."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.common import leave_misfits
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.layers.semi_structured import MadeSemiStructured, made_semi_structured, why_dense
from lightning_sparse.rules import patterns
from lightning_sparse.rules.budgets import Distribution, Scope
from lightning_sparse.rules.patterns import NOfM
from lightning_sparse.rules.transposable import SIDE, largest_tiles

__all__ = ["NOfMCallback"]


def _check_pattern(pattern: str) -> None:
    """Raise unless it is N:M."""
    if patterns.named(pattern).kind != "N:M":
        raise ValueError(f'pattern must be "N:M" with N below M, such as "2:4", got {pattern!r}.')


class NOfMCallback(TopKCallback):
    """Latent weights ``W``; the layers compute with the N largest ``|W|`` of every M neighbouring inputs.

    Weights whose inputs cannot be divided into groups of M stay dense.
    """

    pattern_name: str = option(
        alias="pattern",
        default="2:4",
        kw_only=False,
        check=_check_pattern,
        doc='``"N:M"``: N of every M neighbouring inputs of an output are active, of a convolution N of M input '
        "channels, at each place of its kernel.",
    )
    transposable: bool = option(
        default=False,
        doc="in tiles of 4 outputs by 4 inputs, N of 4 in each row and in each column, so that products with the "
        "transposed weight are N:4 as well; for M = 4.",
    )
    semi_structured: bool = option(
        default=False,
        check=checks.flag,
        doc="in training, multiply by 2:4 weights of linear layers with torch's operators for NVIDIA GPUs of compute "
        "capability 8.0 and more, in float16 or bfloat16: for the output, and with ``transposable`` for the gradient "
        "of the input. A warning names the weights, such as small ones, that are multiplied by as dense ones. What is "
        "trained is the same but for rounding.",
    )
    sparsity_target: float = fixed(default=0.5)  # the pattern's
    scope: Scope = fixed(default="layer")
    distribution: Distribution | Mapping[str, float] = fixed(default="uniform")
    min_layer_density: float = fixed(default=0.0)

    must_stay: ClassVar[Sequence[str]] = ("pattern", "transposable")

    def __post_init__(self) -> None:
        """Take the sparsity of the pattern."""
        super().__post_init__()
        pattern = patterns.named(self.pattern_name)
        assert isinstance(pattern, NOfM), "it has been checked"
        self.pattern, self.sparsity_target = pattern, 1 - pattern.density
        self._told = False
        if self.transposable and pattern.m != SIDE:
            raise ValueError(
                f'transposable needs M = {SIDE}, got pattern={self.pattern_name!r}. Give "2:4", or leave it out.'
            )
        if self.semi_structured and (pattern.n > 2 or pattern.m != SIDE):
            raise ValueError(
                f'semi_structured needs pattern="2:4" or "1:4", got {self.pattern_name!r}: no operator has another.'
            )

    @property
    def needs_whole_weights(self) -> str | None:
        """None, as the groups lie within a row, unless tiles hold several rows."""
        return "Leave transposable out, or use strategy='ddp'." if self.transposable else super().needs_whole_weights

    def choices_in(self, module: nn.Module) -> list[ParameterChoice]:
        """Leave weights dense that cannot have the pattern."""
        choices = leave_misfits(super().choices_in(module), self.pattern, self.pattern_name)
        if self.transposable:
            choices = leave_misfits(choices, patterns.Blocks(SIDE, SIDE), "transposable")
        return choices

    # ------------------------------------------------------------------ products with 2:4 weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over, and have linear layers multiply by them as they are asked to."""
        super().on_fit_start(trainer, pl_module)
        self._told = not self.semi_structured
        self._hasten(pl_module)

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:  # noqa: D102
        super().attach_added(choices, optimizer)
        assert self._fit.module is not None
        self._hasten(self._fit.module)

    def after_update(self, optimizer: Optimizer) -> None:
        """Bring back what the layers compute with; once, name the weights that were multiplied by as dense ones."""
        super().after_update(optimizer)
        if not self._told:
            self._told = True
            self._warn_of_dense()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave effective weights and plain layers behind."""
        super().on_exception(trainer, pl_module, exception)
        self._fit.remove(MadeSemiStructured)

    def _hasten(self, module: nn.Module) -> None:
        """Have the linear layers that hold our weights multiply by them as by 2:4 ones, until the fit ends."""
        if self.semi_structured:
            ours = [weight.parameter for weight in self._weights.values()]
            self._fit.handles += made_semi_structured(module, ours, self.transposable, self._fit.traces)

    def _warn_of_dense(self) -> None:
        """Warn of the weights that training multiplies by as dense ones, with the reasons."""
        found = why_dense(self._fit.handles, {name: weight.parameter for name, weight in self._weights.items()})
        if found:
            reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in found.items())
            self.warn_once(f"{self!r} gains nothing of semi_structured where products are dense: {reasons}.")

    # ------------------------------------------------------------------ the sets

    def mark(self, weight: LatentWeight, key: str, count: int) -> None:
        """Write the set of the N largest scores of each group, or of the largest tiles; no row is ever empty."""
        scores = self.scores(weight)
        if self.transposable:
            chosen = largest_tiles(scores, weight.outputs, self.pattern.n)
        else:
            chosen = self.pattern.largest(weight, scores)
        weight.buffers[key] = torch.empty_like(weight.latent, dtype=torch.bool).copy_(chosen)
