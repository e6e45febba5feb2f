"""Which connections to look at, without ever building the dense matrix: pure functions of tensors.

A connection is its flat position in a weight of shape ``(out, in / groups, *kernel)``. Time and memory go with the
numbers of active and of sampled connections, not with the size of the weight. All draws are made on the CPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lightning_sparse.rules.matrices import Outputs, as_matrix

__all__ = [
    "distinct",
    "draw",
    "free_positions",
    "merged",
    "one_a_row",
    "probabilities",
    "subset",
    "unit_sums",
]

_ROUNDS = 64  # of drawing and rejecting, before what is missing is filled up uniformly
_BATCH, _AT_ONCE = 1 << 10, 1 << 18  # draws of a round, at least and at most


# ---------------------------------------------------------------------- endpoint distributions


def unit_sums(x: Tensor, dim: int) -> Tensor:
    """Return the sum of ``|x|`` for each unit or channel along ``dim``, in single precision at least.

    >>> unit_sums(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), -1)
    tensor([4., 2.])
    """
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(x, 1, others) if others else x.abs()


def probabilities(sums: Tensor) -> Tensor:
    """Divide by the total, in double precision; uniform where there is no total to divide by (0, infinite or NaN).

    >>> probabilities(torch.tensor([1.0, 3.0])), probabilities(torch.zeros(2))
    (tensor([0.2500, 0.7500], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    sums = sums.cpu().double()
    sums = sums / sums.max()  # so that the total of huge numbers does not overflow
    total = sums.sum()
    return sums / total if total > 0 else torch.full_like(sums, 1 / len(sums))


# ---------------------------------------------------------------------- sampling


def subset(
    n: int,
    taken: Tensor,
    shape: Sequence[int],
    generator: Generator,
    f: Tensor | None = None,
    g: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Draw exactly ``n`` different positions that are not ``taken``.

    One after the other, the endpoints are drawn from ``f`` and ``g``, and those of a connection that is taken or was
    drawn before are drawn again. If this comes to no end because nearly all connections to which ``f`` and ``g`` give
    some probability are used up, the rest is drawn uniformly from whatever is left.

    Args:
        n: at most the number of positions that are free.
        taken: flat positions, ascending.
        shape: of the weight, ``(out, in / groups, *kernel)``.
        generator: on the CPU.
        f: probabilities of the inputs, ``(in,)``; None, with ``g``: all free positions are equally likely.
        g: probabilities of the outputs, ``(out,)``.
        groups: output ``o`` reads the inputs of group ``o // (out / groups)`` alone.

    Returns:
        Flat positions, ascending.
    """
    size = math.prod(shape)
    used, found = taken, taken.new_empty(0)
    if f is not None and g is not None and n < size - len(taken) and _joint(f, g, groups).any():
        for _ in range(_ROUNDS + n // _AT_ONCE):
            missing = n - len(found)
            if not missing:
                break
            drawn = draw(min(max(missing, _BATCH), _AT_ONCE), shape, f, g, generator, groups)
            new = _first_occurrences(drawn[~_contains(used, drawn)])[:missing].sort().values
            used, found = merged(used, new), merged(found, new)
    return merged(found, free_positions(n - len(found), used, size, generator))


def draw(n: int, shape: Sequence[int], f: Tensor, g: Tensor, generator: Generator, groups: int = 1) -> Tensor:
    """Draw ``n`` positions independently: output ~ ``g``, input ~ ``f``, place in the kernel ~ uniform.

    With groups, the pairs that are no connection have no probability, and the others keep their proportions.
    Arguments as in ``subset``, but some connection must have a probability above 0.
    """
    out, per_group, kernel = shape[0], shape[1], math.prod(shape[2:])
    of_outputs, of_inputs = _edges(_joint(f, g, groups)), _edges(f)
    o = _invert(of_outputs, of_outputs[:1], of_outputs[-1:], n, generator).clamp_(max=out - 1)
    first = o.div(out // groups, rounding_mode="floor") * per_group  # input of the output's group
    a = _invert(of_inputs, of_inputs[first], of_inputs[first + per_group], n, generator) - first
    a.clamp_(0, per_group - 1)
    return (o * per_group + a) * kernel + torch.randint(kernel, (n,), generator=generator)


def free_positions(n: int, taken: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw ``n`` different positions below ``size`` that are not ``taken`` (ascending), all equally likely."""
    free = size - len(taken)
    if not 0 <= n <= free:
        raise ValueError(f"{n} connections were asked for, {free} are free.")
    ranks = distinct(n, free, generator)
    free_before = torch.arange(len(taken)).neg_().add_(taken)
    return ranks.add_(torch.searchsorted(free_before, ranks, right=True))


def one_a_row(shape: Sequence[int], rows: Outputs, generator: Generator) -> Tensor:
    """Draw a position in each row of a weight of this ``shape``, all of a row equally likely; return them ascending."""
    places = as_matrix(torch.arange(math.prod(shape)).view(*shape), rows)
    drawn = torch.randint(places.shape[1], (len(places), 1), generator=generator)
    return places.gather(1, drawn).reshape(-1).sort().values


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return two ascending vectors without common elements as one, ascending.

    >>> merged(torch.tensor([1, 4, 6]), torch.tensor([0, 5]))
    tensor([0, 1, 4, 5, 6])
    """
    of_b = torch.searchsorted(a, b).add_(torch.arange(len(b)))
    others = torch.ones(len(a) + len(b), dtype=torch.bool)
    others[of_b] = False
    whole = a.new_empty(len(others)).masked_scatter_(others, a)
    whole[of_b] = b
    return whole


def distinct(n: int, below: int, generator: Generator) -> Tensor:
    """Draw ``n`` different whole numbers from 0 to ``below - 1``, ascending, all equally likely; memory goes with n."""
    if 2 * n >= below:
        return torch.randperm(below, generator=generator)[:n].sort().values
    found = torch.empty(0, dtype=torch.long)
    while len(found) < n:  # at least every other draw is a new one
        drawn = torch.cat((found, torch.randint(below, (n - len(found),), generator=generator)))
        drawn.numpy().sort()  # in place: torch's takes several times the memory
        new = torch.ones(n, dtype=torch.bool)
        torch.ne(drawn[1:], drawn[:-1], out=new[1:])
        found = torch.from_numpy(drawn.numpy()[new.numpy()])
    return found


def _joint(f: Tensor, g: Tensor, groups: int) -> Tensor:
    """Return the probability of each output, in proportion, with that of the inputs it reads."""
    return (g.view(groups, -1) * f.view(groups, -1).sum(1, keepdim=True)).view(-1)


def _edges(p: Tensor) -> Tensor:
    return torch.cat((p.new_zeros(1), p.cumsum(0)))


def _invert(edges: Tensor, low: Tensor, high: Tensor, n: int, generator: Generator) -> Tensor:
    """Draw uniformly between ``low`` and ``high`` and return the intervals between ``edges`` that were hit."""
    u = low + (high - low) * torch.rand(n, generator=generator, dtype=edges.dtype)
    return torch.searchsorted(edges[1:].contiguous(), u, right=True)


def _contains(ascending: Tensor, x: Tensor) -> Tensor:
    """Tell which elements of ``x`` are among those of an ascending vector."""
    if not len(ascending):
        return torch.zeros_like(x, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, x).clamp_(max=len(ascending) - 1)] == x


def _first_occurrences(x: Tensor) -> Tensor:
    """Leave out what was there before; the order stays."""
    values, order = x.sort(stable=True)
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    return x[order[new].sort().values]
