"""Tensors of a file with one thing altered, and a judge of indices that shares no code with the package."""

from itertools import pairwise

import torch
from hypothesis import strategies as st

_WRONG = st.sampled_from([-1, 1, 7, 2**31, -(2**31), 2**40, 10**8])
_OTHERS = st.sampled_from(
    [None, "0", [0, 1], torch.zeros(0), torch.tensor(3), torch.zeros(2, 2), torch.zeros(3, device="meta")]
)
_DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64]


@st.composite
def alterations(draw):
    """Yield functions that return a vector with one thing altered; of numbers that are not indices, the form alone."""
    kind = draw(
        st.sampled_from(["shift", "set", "flip", "cut", "longer", "swap", "repeat", "dtype", "matrix", "other"])
    )
    by, dtype, at, other = draw(_WRONG), draw(st.sampled_from(_DTYPES)), draw(st.integers(0, 40)), draw(_OTHERS)

    def alter(x):
        wide = x.clone().long() if not x.is_floating_point() else x.clone()
        at_, indices = at % max(len(x), 1), not x.is_floating_point()
        if kind == "shift" and indices:
            return wide + by
        if kind == "set" and indices:
            return torch.cat((wide[:at_], torch.tensor([by]), wide[at_ + 1 :]))
        if kind == "flip":
            return wide.flip(0)
        if kind == "cut":
            return x[:at_].clone()
        if kind == "longer":
            return torch.cat((x, x[-1:]))
        if kind == "swap" and indices:
            return torch.cat((wide[:at_], wide[at_ : at_ + 2].flip(0), wide[at_ + 2 :]))
        if kind == "repeat" and indices:
            return torch.cat((wide[:at_], wide[at_ : at_ + 1].repeat(2), wide[at_ + 2 :]))
        if kind == "dtype":
            return x.to(dtype)
        if kind == "matrix":
            return x.reshape(1, -1).clone()
        return other

    return alter


def is_vector(x, indices):
    """Tell whether ``x`` is a vector of whole numbers, or of others."""
    if not isinstance(x, torch.Tensor) or x.is_meta or x.ndim != 1:
        return False
    return x.dtype in (torch.int32, torch.int64) if indices else x.is_floating_point()


def is_csr(crow, col, values, shape, groups=1):
    """Tell, element by element, whether these are the nonzeros of a weight."""
    if not (is_vector(crow, True) and is_vector(col, True) and is_vector(values, False)):
        return False
    crow, col, n = crow.tolist(), col.tolist(), int(torch.Size(shape[1:]).numel())
    if len(crow) != shape[0] + 1 or len(col) != len(values) or crow[0] != 0 or crow[-1] != len(col):
        return False
    for row, (first, last) in enumerate(pairwise(crow)):
        low = row * groups // shape[0] * n
        if not first <= last <= len(col) or col[first:last] != sorted(set(col[first:last])):
            return False
        if not all(low <= column < low + n for column in col[first:last]):
            return False
    return True


def is_positions(positions, size):
    """Tell, element by element, whether these are different positions, ascending, among ``size``."""
    if not is_vector(positions, True):
        return False
    return positions.tolist() == sorted({at for at in positions.tolist() if 0 <= at < size})


def unchanged(before, after):
    """Tell whether two states hold the same tensors."""
    return before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
