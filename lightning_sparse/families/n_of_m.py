"""NOfMCallback: dense latent weights, of which the layers compute with N of every M neighbouring inputs."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families.common import leave_misfits
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.layers.selection import ParameterChoice
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
        if self.transposable and pattern.m != SIDE:
            raise ValueError(
                f'transposable needs M = {SIDE}, got pattern={self.pattern_name!r}. Give "2:4", or leave it out.'
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

    def mark(self, weight: LatentWeight, key: str, count: int) -> None:
        """Write the set of the N largest scores of each group, or of the largest tiles; no row is ever empty."""
        scores = self.scores(weight)
        if self.transposable:
            chosen = largest_tiles(scores, weight.outputs, self.pattern.n)
        else:
            chosen = self.pattern.largest(weight, scores)
        weight.buffers[key] = torch.empty_like(weight.latent, dtype=torch.bool).copy_(chosen)
