"""Which connections to look at, without ever building the dense matrix: pure functions of tensors.

A connection is its flat position in a weight of shape ``(out, in / groups, *kernel)``. Time and memory go with the
numbers of active and of sampled connections, not with the size of the weight. All draws are made on the CPU.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from lightning_sparse.kernels.positions import located, shifted, unheld
from lightning_sparse.rules.ascending import contains, different, merged
from lightning_sparse.rules.drawn import Drawn, drawn
from lightning_sparse.rules.matrices import Outputs, as_matrix

__all__ = [
    "EVERYWHERE",
    "Endpoints",
    "Everywhere",
    "distinct",
    "free_positions",
    "one_a_row",
    "probabilities",
    "race",
    "subset",
    "unit_sums",
]

_ROUNDS = 64  # of drawing and rejecting, before what is missing is filled up uniformly
_BATCH, _AT_ONCE = 1 << 10, 1 << 18  # draws of a round, at least; of which so many at once
_FEW = 1 << 14  # missing ones, for which it pays to draw more than are missing


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


class Everywhere:
    """Where positions are drawn: in all of a weight. See :mod:`~lightning_sparse.rules.parts` for parts of one."""

    def num_free(self, taken: Tensor, size: int) -> int:
        """Return how many positions of a weight are not ``taken``."""
        return size - len(taken)

    def free_positions(self, n: int, taken: Tensor, size: int, generator: Generator) -> Tensor:
        """See ``free_positions``."""
        return free_positions(n, taken, size, generator)

    def drawn(self, n: int, taken: Tensor, size: int) -> Drawn:
        """See ``drawn``."""
        return drawn(n, taken, size)


EVERYWHERE = Everywhere()


def subset(
    n: int,
    taken: Tensor,
    shape: Sequence[int],
    generator: Generator,
    f: Tensor | None = None,
    g: Tensor | None = None,
    groups: int = 1,
    where: Everywhere = EVERYWHERE,
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
        where: a part of the weight, whose positions are ``taken`` and returned.

    Returns:
        Flat positions, ascending.
    """
    size = math.prod(shape)
    ends = None if f is None or g is None else Endpoints(shape, f, g, groups)
    if ends is None or not ends.exist or n == where.num_free(taken, size):
        return where.free_positions(n, taken, size, generator)
    found = where.drawn(n, taken, size)
    for _ in range(_ROUNDS):
        missing = n - found.count
        if missing > _FEW:  # all that are new belong to the first n, whatever their order
            for positions in ends.by_output(missing, generator):
                found.add(positions)
        elif missing:
            more = max(_BATCH, 4 * missing)  # so that few rounds remain
            found.add_first(ends.draw(more, generator), missing)
        else:
            return found.positions
    missing, positions = n - found.count, found.positions
    return merged(positions, where.free_positions(missing, merged(taken, positions), size, generator))


class Endpoints:
    """What draws connections: output ~ ``g``, input ~ ``f``, place in the kernel ~ uniform.

    With groups, the pairs that are no connection have no probability, and the others keep their proportions. Arguments
    as in ``subset``.
    """

    def __init__(self, shape: Sequence[int], f: Tensor, g: Tensor, groups: int = 1) -> None:
        out, self._per_group, self._kernel = shape[0], shape[1], math.prod(shape[2:])
        of_outputs = (g.view(groups, -1) * f.view(groups, -1).sum(1, keepdim=True)).view(-1)  # and what they read
        self._inputs, self._outputs, self._groups = _Intervals(f), _Intervals(of_outputs), groups
        self._first_inputs = torch.arange(out).div_(out // groups, rounding_mode="floor").mul_(self._per_group)
        self._shifts = torch.arange(0, out * self._per_group, self._per_group).sub_(self._first_inputs)

    @property
    def exist(self) -> bool:
        """Some connection has a probability above 0."""
        return bool(self._outputs.lengths.any())

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draw ``n`` positions independently."""
        positions = torch.cat([self._inputs.lengths.new_empty(0).long(), *self.by_output(n, generator)])
        return positions[torch.randperm(n, generator=generator)]

    def by_output(self, n: int, generator: Generator) -> Iterator[Tensor]:
        """Yield what ``draw`` draws, but output by output, so that neighbours in memory come together."""
        counts = self._outputs.counts(n, generator)
        for some in _parts(counts):
            rows = pad(counts[some].cumsum(0), (1, 0))
            a = self._inputs.draw(rows, self._first_inputs[some], self._per_group, generator)
            positions = shifted(rows, a, self._shifts[some], torch.int64)
            if self._kernel > 1:
                positions.mul_(self._kernel).add_(torch.randint(self._kernel, (len(a),), generator=generator))
            yield positions


def free_positions(n: int, taken: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw ``n`` different positions below ``size`` that are not ``taken`` (ascending), all equally likely."""
    free = size - len(taken)
    if not 0 <= n <= free:
        raise ValueError(f"{n} connections were asked for, {free} are free.")
    places = distinct(n, free, generator)  # among the free ones
    return unheld(taken, places)


def one_a_row(shape: Sequence[int], rows: Outputs, generator: Generator) -> Tensor:
    """Draw a position in each row of a weight of this ``shape``, all of a row equally likely; return them ascending."""
    places = as_matrix(torch.arange(math.prod(shape)).view(*shape), rows)
    chosen = torch.randint(places.shape[1], (len(places), 1), generator=generator)
    return places.gather(1, chosen).reshape(-1).sort().values


def race(chances: Tensor, generator: Generator) -> Tensor:
    """Return numbers whose ``n`` largest are ``n`` elements drawn one after the other, without replacement.

    Each is drawn in proportion to its chance among those that are left (an exponential race, Efraimidis & Spirakis,
    2006). Elements without a chance come last, in random order.

    Args:
        chances: at least 0, of any shape; NaN counts as infinitely large.
        generator: on the CPU.

    Returns:
        Of the same shape, in double precision, on the device of ``chances``.
    """
    p = chances.double().nan_to_num(nan=math.inf)
    waits = torch.empty(p.shape, dtype=torch.double).exponential_(generator=generator).to(p.device)
    return torch.where(p > 0, p / waits, -waits)


def distinct(n: int, below: int, generator: Generator) -> Tensor:
    """Draw ``n`` different whole numbers from 0 to ``below - 1``, ascending, all equally likely; memory goes with n."""
    if 2 * n >= below:
        return torch.randperm(below, generator=generator)[:n].sort().values
    found = different(torch.randint(below, (n,), generator=generator))
    while len(found) < n:  # at least every other draw is a new one
        new = different(torch.randint(below, (n - len(found),), generator=generator))
        found = merged(found, new[~contains(found, new)])
    return found


class _Intervals:
    """Intervals one after the other from 0 on, in which numbers are found in constant time.

    Args:
        lengths: of the intervals, at most 1 in all.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths, self._edges = lengths, torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        self._ends = self._edges[1:].contiguous()
        buckets = 1 << (16 * len(lengths)).bit_length()  # a power of 2 multiplies exactly
        limits = torch.arange(buckets, dtype=lengths.dtype).div_(buckets)
        self._first = torch.searchsorted(self._ends, limits, right=True).int()  # in which a bucket begins

    def draw(self, rows: Tensor, low: Tensor, width: int, generator: Generator) -> Tensor:
        """Draw intervals in proportion to their lengths, row by row.

        Args:
            rows: where the draws of each row begin, and where those of the last one end, ``(rows + 1,)``.
            low: the first interval that each row draws from, ``(rows,)``.
            width: how many it draws from, from there on.
            generator: on the CPU.
        """
        n, begin = int(rows[-1]), self._edges[low]
        length = self._edges[low + width] - begin
        u = torch.rand(n, generator=generator, dtype=self._edges.dtype)
        if bool((low == low[0]).all()):
            u.mul_(length[0]).add_(begin[0])
        else:
            u.mul_(length.repeat_interleave(rows.diff(), output_size=n))
            u.add_(begin.repeat_interleave(rows.diff(), output_size=n))
        return located(u, self._ends, self._first, rows, low, width)

    def counts(self, n: int, generator: Generator) -> Tensor:
        """Return how often each interval comes in ``n`` draws."""
        counts = torch.zeros(len(self.lengths), dtype=torch.long)
        likely = n - 5 * n**0.5  # draws; what is missing to n are drawn one by one
        while likely > 0:  # the number of draws may be any that what was drawn does not choose
            counts = torch.poisson(self.lengths * (likely / self._edges[-1]), generator=generator).long()
            if int(counts.sum()) <= n:
                break
        rows = torch.tensor([0, n - int(counts.sum())])
        rest = self.draw(rows, torch.tensor([0]), len(counts), generator)
        return counts.add_(torch.bincount(rest, minlength=len(counts)))


def _parts(counts: Tensor) -> Iterator[slice]:
    """Yield slices in each of which the counts, if they are several, are about as many as are drawn at once."""
    total = counts.cumsum(0)
    ends = torch.searchsorted(total, torch.arange(_AT_ONCE, int(total[-1]) + _AT_ONCE, _AT_ONCE)).add_(1)
    edges = [0, *sorted(set(ends.clamp_(max=len(counts)).tolist()))]
    return (slice(low, high) for low, high in pairwise(edges))
