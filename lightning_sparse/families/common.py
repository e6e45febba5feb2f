"""What the arguments that several families take are, and which values they may have."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from lightning_sparse.compat import checks
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.budgets import DISTRIBUTIONS, Distribution
from lightning_sparse.rules.patterns import Pattern

__all__ = [
    "DISTRIBUTION",
    "FINAL_SPARSITY",
    "MIN_LAYER_DENSITY",
    "PATTERN",
    "PRUNING_SCOPE",
    "SCALE_INIT",
    "SCOPE",
    "SPARSITY",
    "Interval",
    "check_distribution",
    "check_interval",
    "check_min_layer_density",
    "check_sparsity",
    "leave_misfits",
]

SPARSITY = "share of zeros over all selected weights, in [0, 1)."
FINAL_SPARSITY = "share of zeros at the end over all selected weights, in [0, 1)."
DISTRIBUTION = (
    'how the active weights are divided among layers: ``"erk"``, ``"er"``, ``"uniform"``, ``"uniform_first_dense"``, '
    "or a density for each glob pattern on parameter names."
)
MIN_LAYER_DENSITY = "no layer falls below this density."
PATTERN = (
    'which connections go together. ``"unstructured"``: each by itself; ``"N:M"``, such as ``"2:4"``: at most N of '
    "every M neighbouring inputs of an output (input channels of a convolution, at each place of its kernel); "
    '``"block:RxC"``: blocks of R outputs by C inputs, whole or absent; ``"row"``: all inputs of an output. With '
    "blocks and rows, ``sparsity`` and the other shares count these. Weights that cannot be divided so stay dense."
)
SCALE_INIT = (
    "scale the weights of a network made anew to the connections that are left. Without it activations shrink from "
    "layer to layer, and short trainings stay far behind."
)
SCOPE = 'the largest of each ``"layer"``, or of all together (``"global"``).'
PRUNING_SCOPE = (
    'compare the weights of all layers (``"global"``), or prune each ``"layer"`` to its own count, given by '
    "``distribution``."
)

check_sparsity = partial(checks.fraction, "It is the share of zeros, 0.9 for 10 % of the weights.", below_1=True)
check_min_layer_density = partial(checks.fraction, "0 lets a layer become empty.")

#: number of optimizer steps from update to update, or "auto"
Interval = int | Literal["auto"]


def check_interval(update_every: Interval | None) -> None:
    """Raise unless it is a number of steps or "auto"."""
    if update_every != "auto":
        remedy = "'auto' takes the paper's interval, or a shorter one where the training is shorter."
        checks.integer(1, remedy, update_every=update_every)  # type: ignore[arg-type]  # may be anything


def check_distribution(distribution: Distribution | Mapping[str, float]) -> None:
    """Raise unless it is one of the distributions, or all densities are in range."""
    if isinstance(distribution, str):
        checks.one_of(DISTRIBUTIONS, distribution=distribution)
        return
    if not isinstance(distribution, Mapping) or not all(isinstance(pattern, str) for pattern in distribution):
        raise ValueError(
            f"distribution must be one of {sorted(DISTRIBUTIONS)}, or a density for each glob pattern such as "
            f'{{"*.head.weight": 0.5}}, got {distribution!r}.'
        )
    for pattern, density in distribution.items():
        checks.fraction(f"It is the density of the weights {pattern!r}.", distribution=density)


def leave_misfits(choices: Sequence[ParameterChoice], pattern: Pattern, name: str) -> list[ParameterChoice]:
    """Leave the weights dense that cannot have a pattern, which the table calls by this ``name``."""
    for choice in choices:
        if choice.reason is None:
            misfit = pattern.misfit(choice.shape, choice.outputs, choice.nonempty)
            choice.reason = f"{name}: {misfit}" if misfit else None
    return list(choices)
