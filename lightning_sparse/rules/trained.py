"""Whether a weight looks trained: a pure function of its values, for warnings.

Every usual initialisation draws the elements of a weight alike: from one uniform, normal or truncated normal
distribution, or as an orthogonal matrix. Then the mean squares of its rows, and of its columns, differ by chance alone.
Training makes some neurons and some inputs count more than others.
"""

import torch
from torch import Tensor

__all__ = ["looks_trained"]

_SAMPLED = 512  # rows and columns looked at
_FEWEST_LINES, _SHORTEST = 8, 16  # rows to compare, and elements that a mean square is of
_DEVIATIONS = 6  # one in a billion by chance
_ZEROS = 0.05  # more than rounding makes


@torch.no_grad()
def looks_trained(W: Tensor) -> bool:
    """Tell whether the values of a weight are unlike those of a fresh one.

    They are if there are zeros among other values (rows and columns of zeros apart, as of a padding index), or if the
    mean squares of rows, or of columns, differ more than those of elements that are drawn alike. At most 512 rows and
    columns are looked at. A weight that is small, zero, an identity, or not finite never looks trained.

    Args:
        W: of any shape with two dimensions or more; the first one is that of rows.

    >>> fresh = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> looks_trained(fresh), looks_trained(fresh * (fresh.abs() > 1)), looks_trained(fresh * torch.rand(64))
    (False, True, True)
    """
    if not W.numel():
        return False
    x = _sample(W)
    if not x.numel() or not x.isfinite().all() or bool((x.abs() == x.abs().max()).logical_or_(x == 0).all()):
        return False
    return float((x == 0).double().mean()) > _ZEROS or _differ(x) or _differ(x.T)


def _sample(W: Tensor) -> Tensor:
    """Return some rows and columns ``(out, n)``, without those of zeros alone."""
    matrix = W.detach().reshape(len(W), -1)
    strides = [max(1, size // _SAMPLED) for size in matrix.shape]
    x = matrix[:: strides[0], :: strides[1]].float()
    used = x != 0
    return x[used.any(1)][:, used.any(0)]


def _differ(x: Tensor) -> bool:
    """Tell whether the mean squares of rows differ more than by chance: chi-square, as Wilson and Hilferty have it."""
    lines, length = x.shape
    if lines < _FEWEST_LINES or length < _SHORTEST:
        return False
    squares = (x / x.square().mean().sqrt()).square().double()
    of_rows, by_chance = squares.mean(1), squares.var() / length
    freedom = lines - 1
    ratio = float(of_rows.var() / by_chance)
    expected = 2 / (9 * freedom)
    return bool((ratio ** (1 / 3) - (1 - expected)) / expected**0.5 > _DEVIATIONS)
