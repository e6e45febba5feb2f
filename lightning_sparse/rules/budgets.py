"""How a budget of active weights is divided among layers: pure functions of shapes and whole numbers.

The count of each layer is settled once, in whole numbers that add up to the budget: densities are never rounded twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache
from typing import Literal

from lightning_sparse.compat.checks import did_you_mean

__all__ = [
    "DISTRIBUTIONS",
    "Distribution",
    "Scope",
    "Stack",
    "apportion",
    "budget",
    "er",
    "erk",
    "floors",
    "layer_counts",
    "least",
    "portion",
    "shrunk",
    "uniform",
    "uniform_first_dense",
]

Shape = tuple[int, ...]


class Stack(tuple[int, ...]):
    """The shape of a stack of matrices, such as experts: the first dimension counts them."""

    __slots__ = ()


Distribution = Literal["erk", "er", "uniform", "uniform_first_dense"]
Scope = Literal["global", "layer"]


def budget(sparsity: float, size: int) -> int:
    """Return the number of active weights among ``size``.

    >>> budget(0.9, 266200)
    26620
    """
    return size - round(sparsity * size)


def _exact(fraction: float) -> Fraction:
    """Return 3/10 for 0.3, which as a binary number is a little less."""
    return Fraction(str(fraction))


def portion(fraction: float, count: int) -> int:
    """Return ``fraction``, taken as the decimal number it is written as, of ``count``, rounded down.

    >>> portion(0.29, 100), portion(0.3, 5)
    (29, 1)
    """
    return math.floor(_exact(fraction) * count)


@cache
@cache
def least(density: float, size: int) -> int:
    """Return the smallest number among ``size`` that makes at least ``density``.

    >>> least(0.01, 250), least(0.07, 100)
    (3, 7)
    """
    return math.ceil(_exact(density) * size)


def floors(density: float, sizes: Sequence[int], total: int, rows: Sequence[int] | None = None) -> list[int]:
    """Return the number of weights that each layer of a budget keeps at least.

    Args:
        density: the least of each layer.
        sizes: of the layers.
        total: the budget.
        rows: number of weights that each layer keeps at least whatever the density, as one in each row that must not
            be empty; None: 0.

    Raises:
        ValueError: these alone are above the budget.
    """
    lowest = [least(density, size) for size in sizes]
    if sum(lowest) > total:
        raise ValueError(
            f"min_layer_density={density} alone takes {sum(lowest)} weights, the budget is {total}. "
            "Lower it or sparsity."
        )
    lowest = [max(n, row) for n, row in zip(lowest, rows or [0] * len(lowest), strict=True)]
    if sum(lowest) > total:
        raise ValueError(
            "a weight in each row that is divided by its norm, as by weight_norm, or a whole fan-in of each neuron, "
            f"takes {sum(lowest)} weights, the budget is {total}. Lower sparsity or min_layer_density, or leave such "
            "layers dense with exclude."
        )
    return lowest


def apportion(total: int, weights: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, none above its capacity: whole numbers that sum up to ``total``.

    What is over a capacity is divided among the others in the same proportions. Fractions are settled by largest
    remainder, the earlier first among equals; if all weights with room are 0, they count as equal.

    Raises:
        ValueError: the capacities do not hold ``total``.

    >>> apportion(10, [1, 1, 8], [10, 10, 5])
    [3, 2, 5]
    """
    if not 0 <= total <= sum(capacities):
        raise ValueError(f"{total} cannot be divided among capacities that sum up to {sum(capacities)}.")
    result = [0] * len(capacities)
    open_ = [i for i, capacity in enumerate(capacities) if capacity > 0]
    left = total
    while open_ and left:
        scale = [weights[i] for i in open_]
        if not sum(scale) > 0:
            scale = [1.0] * len(open_)
        exact = {i: left * w / sum(scale) for i, w in zip(open_, scale, strict=True)}
        full = [i for i in open_ if exact[i] >= capacities[i]]
        if not full:
            for i in open_:
                result[i] = math.floor(exact[i])
            by_remainder = sorted(open_, key=lambda i: (result[i] - exact[i], i))
            rest = left - sum(result[i] for i in open_)
            for i in by_remainder[:rest]:
                result[i] += 1
            break
        for i in full:
            result[i] = capacities[i]
        left = total - sum(result)
        open_ = [i for i in open_ if i not in full]
    return result


def shrunk(counts: Sequence[int], final: Sequence[int], total: int) -> list[int]:
    """Take what ``counts`` have above ``final`` away in equal proportions, until ``total`` are left.

    >>> shrunk([100, 20], [10, 20], 75)
    [55, 20]
    """
    final = [min(n, count) for n, count in zip(final, counts, strict=True)]
    above = [count - n for n, count in zip(final, counts, strict=True)]
    left = apportion(total - sum(final), above, above)
    return [n + more for n, more in zip(final, left, strict=True)]


def uniform(shapes: Sequence[Shape], total: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Give every layer the same density."""
    sizes = _sizes(shapes) if sizes is None else sizes
    return apportion(total, sizes, sizes)


def uniform_first_dense(shapes: Sequence[Shape], total: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Leave the first layer dense and give all others the same density (RigL, Sec. 3)."""
    first, *others = _sizes(shapes) if sizes is None else sizes
    if first > total:
        raise ValueError(
            f"distribution='uniform_first_dense' keeps the first layer whole, which has {first} weights, but sparsity "
            f"leaves {total} in all. Lower sparsity, or use 'uniform'."
        )
    return [first, *uniform(shapes[1:], total - first, others)]


def er(shapes: Sequence[Shape], total: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Erdős-Rényi: density proportional to ``(n_in + n_out) / (n_in n_out)``, at most 1 (SET).

    >>> er([(10, 10), (10, 40)], 70)
    [20, 50]
    """
    weights = [n * (s[0] + s[1]) * math.prod(s[2:]) for n, s in map(_matrices, shapes)]
    return _by_weights(total, weights, shapes, sizes)


def erk(shapes: Sequence[Shape], total: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Erdős-Rényi-kernel: density proportional to ``(c_in + c_out + k_h + k_w) / (c_in c_out k_h k_w)``, at most 1.

    The rule of RigL (Sec. 3): layers that would exceed 1 become dense and the others share the rest.

    >>> erk([(8, 4, 3, 3), (10, 8)], 180)
    [100, 80]
    """
    return _by_weights(total, [n * sum(s) for n, s in map(_matrices, shapes)], shapes, sizes)


def _sizes(shapes: Sequence[Shape]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


def _by_weights(total: int, weights: Sequence[int], shapes: Sequence[Shape], sizes: Sequence[int] | None) -> list[int]:
    """Divide ``total`` units so that layers have densities as if connections were divided in proportion to weights."""
    whole = _sizes(shapes)
    if sizes is None or list(sizes) == whole:
        return apportion(total, weights, whole)
    return apportion(total, [w * n / size for w, n, size in zip(weights, sizes, whole, strict=True)], sizes)


def _matrices(shape: Shape) -> tuple[int, Shape]:
    """Return the number of matrices of a layer and the shape of one."""
    return (shape[0], tuple(shape[1:])) if isinstance(shape, Stack) else (1, shape)


DISTRIBUTIONS: dict[str, Callable[[Sequence[Shape], int, Sequence[int] | None], list[int]]] = {
    function.__name__: function for function in (uniform, uniform_first_dense, er, erk)
}


def layer_counts(
    distribution: Distribution | Mapping[str, float],
    shapes: Mapping[str, Shape],
    total: int,
    floor: float = 0.0,
    rows: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    capacities: Sequence[int] | None = None,
) -> dict[str, int]:
    """Return the number of active weights of each layer, or of active units of several weights, ``total`` in all.

    Args:
        distribution: a name of ``DISTRIBUTIONS``, or densities by glob pattern on the layers' names; the layers that no
            pattern matches share what the others leave, at one density.
        shapes: the weights' shapes by name.
        total: the budget.
        floor: the least density of a layer.
        rows: number of weights or units that each layer keeps at least whatever the floor; None: 0.
        units: number of units of each layer; None: its weights.
        capacities: how many of these may be active; None: all. What a layer cannot take goes to the others.

    Raises:
        ValueError: the densities given do not add up to the budget.
    """
    names, found = list(shapes), list(shapes.values())
    sizes = dict(zip(names, _sizes(found) if units is None else units, strict=True))
    if isinstance(distribution, str):
        counts = dict(zip(names, DISTRIBUTIONS[distribution](found, total, list(sizes.values())), strict=True))
    else:
        counts = _by_pattern(distribution, sizes, total)
    if capacities is not None and any(counts[name] > n for name, n in zip(names, capacities, strict=True)):
        counts = dict(zip(names, apportion(total, list(counts.values()), capacities), strict=True))
    lowest = dict(zip(names, floors(floor, list(sizes.values()), total, rows), strict=True))
    raised = [name for name in names if counts[name] < lowest[name]]
    if raised:
        rest = [name for name in names if name not in raised]
        room = [counts[name] - lowest[name] for name in rest]
        taken = apportion(sum(lowest[name] - counts[name] for name in raised), room, room)
        counts |= {name: lowest[name] for name in raised}
        counts |= {name: counts[name] - n for name, n in zip(rest, taken, strict=True)}
    return counts


def _by_pattern(densities: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Give matched layers their density and the others the rest."""
    given: dict[str, float] = {}
    for pattern, density in densities.items():
        matched = [name for name in sizes if fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)]
        if not matched:
            near = did_you_mean(pattern, sizes)
            raise ValueError(f"distribution: the pattern {pattern!r} matches none of {list(sizes)}. {near}".rstrip())
        given |= dict.fromkeys(matched, density)
    counts = {name: round(density * sizes[name]) for name, density in given.items()}
    others = [name for name in sizes if name not in given]
    left = total - sum(counts.values())
    room = [sizes[name] for name in others]
    if not others and abs(left) <= len(sizes):  # the same densities but for rounding
        exact = [density * sizes[name] for name, density in given.items()]
        given_counts = dict(zip(given, apportion(total, exact, [sizes[name] for name in given]), strict=True))
        return {name: given_counts[name] for name in sizes}
    if not 0 <= left <= sum(room) or (left and not others):
        size = sum(sizes.values())
        raise ValueError(
            f"distribution gives {sum(counts.values())} weights to the layers it names, but the asked sparsity leaves "
            f"{total} of {size} to all. Change its densities, or set sparsity={1 - sum(counts.values()) / size:.6g}."
        )
    counts |= zip(others, apportion(left, room, room), strict=True)
    return {name: counts[name] for name in sizes}
