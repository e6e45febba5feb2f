"""Which pattern a method takes, and what its other arguments must be for that."""

from collections.abc import Mapping
from typing import Protocol

from lightning_sparse.families import starts
from lightning_sparse.rules import patterns
from lightning_sparse.rules.budgets import Distribution
from lightning_sparse.rules.patterns import UNSTRUCTURED, Pattern

__all__ = ["fitting_pattern"]


class _Method(Protocol):
    """What a pattern asks of its method."""

    pattern: Pattern
    pattern_name: str
    sparsity_target: float | None
    initial: str
    distribution: Distribution | Mapping[str, float]
    min_layer_density: float

    @property
    def unfit_patterns(self) -> Mapping[str, str]: ...


def fitting_pattern(method: _Method) -> tuple[Pattern, float | None]:
    """Return the pattern, and the sparsity: for None, where no start tells it, what N:M has.

    The pattern is that of the method's class, if it has one, else that of ``pattern_name``.

    Raises:
        ValueError: the method cannot have it, or the other arguments ask for more connections than it allows.
    """
    if method.pattern is not UNSTRUCTURED:
        return method.pattern, method.sparsity_target
    pattern, sparsity = patterns.named(method.pattern_name), method.sparsity_target
    name, density = f"pattern={method.pattern_name!r}", pattern.density
    if pattern.kind in method.unfit_patterns:
        raise ValueError(f"{type(method).__name__} cannot have {name}: {method.unfit_patterns[pattern.kind]}")
    if density == 1:
        return pattern, sparsity
    if sparsity is None:
        sparsity = None if starts.start(method.initial).knows_number else 1 - density
    elif sparsity < 1 - density - 1e-9:
        raise ValueError(
            f"sparsity must be at least {1 - density:.6g} with {name}, got {sparsity!r}: no more than "
            f"{density:.6g} of the connections fit. Raise it, or give another pattern."
        )
    given = method.distribution.values() if isinstance(method.distribution, Mapping) else ()
    dense = method.distribution == "uniform_first_dense" or any(each > density for each in given)
    if dense or method.min_layer_density > density:
        raise ValueError(
            f"distribution and min_layer_density must give no layer a density above {density:.6g} with {name}, got "
            f"{method.distribution!r} and {method.min_layer_density!r}. Leave layers that are to be dense out with "
            "exclude."
        )
    return pattern, sparsity
