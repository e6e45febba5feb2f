"""Boolean masks: pure functions of tensors. Counts are exact; :mod:`~lightning_sparse.rules.ties` tells equals apart.

NaN counts as infinitely large, so what is not a number any more stays in sight.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.bits import INTEGERS
from lightning_sparse.kernels.positions import marked, reached
from lightning_sparse.rules import ties
from lightning_sparse.rules.budgets import apportion
from lightning_sparse.rules.matrices import Outputs, as_matrix, write_matrix

__all__ = [
    "CHUNK",
    "Score",
    "all_equal",
    "count",
    "count_global_top_k",
    "first_of_rows",
    "global_top_k",
    "largest",
    "largest_of",
    "largest_or_above",
    "likely_bound",
    "lowest_positions",
    "positions",
    "put_",
    "top_k",
    "top_k_positions",
    "where",
    "zero_outside_",
]

#: what is compared, element by element, of a tensor
Score = Callable[[Tensor], Tensor]

#: number of elements that a CPU's cache holds beside as many of a mask
CHUNK = 1 << 18

_SAMPLED_FROM = 1 << 17
_NUMPY = torch.float32, torch.float64, torch.int64


def count(mask: Tensor) -> int:
    """Return the number of True elements, or of those that are not 0."""
    if mask.is_cpu and mask.dtype == torch.bool:  # numpy's is quicker
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def all_equal(scores: Tensor) -> bool:
    """Tell whether there are several scores, and all of them are the same.

    >>> all_equal(torch.zeros(2, 3)), all_equal(torch.zeros(1))
    (True, False)
    """
    return scores.numel() > 1 and bool(torch.eq(*scores.aminmax()))


def top_k(scores: Tensor, k: int, among: Tensor | None = None, order: ties.Order | None = None) -> Tensor:
    """Mark exactly the ``k`` largest scores.

    Args:
        scores: any shape.
        k: from 0 to the number of candidates.
        among: the candidates, a boolean tensor of the same shape; default: all.
        order: tells equals apart; default: by their positions in a weight of the scores' shape.

    >>> top_k(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), 2)
    tensor([[ True,  True],
            [False, False]])
    """
    return _marked(top_k_positions(scores, k, among, order), scores)


def top_k_positions(scores: Tensor, k: int, among: Tensor | None = None, order: ties.Order | None = None) -> Tensor:
    """Return the flat positions of exactly the ``k`` largest scores, ascending; arguments as in ``top_k``."""
    return _extreme(scores, k, among, order, largest=True)


def lowest_positions(scores: Tensor, k: int, among: Tensor | None = None, order: ties.Order | None = None) -> Tensor:
    """Return the flat positions of exactly the ``k`` smallest scores, ascending; arguments as in ``top_k``.

    They are those that the largest leave: of equals the last in the order.
    """
    return _extreme(scores, k, among, order, largest=False)


def global_top_k(scores: Sequence[Tensor], k: int, orders: Sequence[ties.Order]) -> list[Tensor]:
    """Return the flat positions of exactly the ``k`` largest scores of all tensors together, ascending, for each.

    The tensors are taken one after the other, and only the largest ``k`` so far are kept: never all at once. Arguments
    as in ``count_global_top_k``, and an order for the equals of each tensor, as in ``top_k``.

    >>> global_top_k([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2, [lambda indices: indices] * 2)
    [tensor([0]), tensor([0])]
    """
    counts = count_global_top_k(scores, k, None)
    return [top_k_positions(s, n, order=order) for s, n, order in zip(scores, counts, orders, strict=True)]


def count_global_top_k(
    tensors: Iterable[Tensor],
    k: int,
    among: Sequence[Tensor] | None,
    at_least: Sequence[int] | None = None,
    score: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> list[int]:
    """Return how many of the ``k`` largest scores of all tensors together lie in each of them.

    The tensors are taken one by one, and only the largest ``k`` so far are kept (GGR, Sec. 3.3). Samples of all of them
    tell what cannot be among them, which is left out, and what is above the last one, which is counted alone. Of scores
    that equal the last one, each tensor gets a share in proportion to how many it has.

    Args:
        tensors: of any shapes.
        k: how many in all.
        among: the candidates, a boolean tensor for each; None: all.
        at_least: so many of each tensor's largest are among the ``k`` in any case.
        score: what is compared, element by element, such as ``torch.abs``; computed for one tensor at a time.
    """
    tensors = list(tensors)
    least = [0] * len(tensors) if at_least is None else list(at_least)
    candidates: Sequence[Tensor | None] = [None] * len(tensors) if among is None else among
    extra = k - sum(least)
    if extra == 0:
        return least

    def sample(stride: int) -> Iterator[Tensor]:
        for tensor, marks in zip(tensors, candidates, strict=True):
            some = score(tensor.reshape(-1)[::stride])
            yield some if marks is None else some[marks.reshape(-1)[::stride]]

    low, high = _likely_between(sum(tensor.numel() for tensor in tensors), extra, k, sample)
    won = _winners(tensors, extra, candidates, least, score, low, high)
    if sum(won) != extra:  # the sample was misleading, or there are scores that are not numbers
        won = _winners(tensors, extra, candidates, least, lambda tensor: _numbers(score(tensor)))
    return [sure + more for sure, more in zip(least, won, strict=True)]


def _winners(
    tensors: Sequence[Tensor],
    k: int,
    among: Sequence[Tensor | None],
    least: Sequence[int],
    score: Callable[[Tensor], Tensor],
    bound: Tensor | None = None,
    high: Tensor | None = None,
) -> list[int]:
    """Return how many of the ``k`` largest scores of at least ``bound`` lie in each tensor, beside its ``least``.

    What is above ``high`` is counted, not kept. If that is more than ``k``, all of it is returned.
    """
    best, owner = torch.empty(0), torch.empty(0, dtype=torch.long)  # what is above the bound, and not above ``high``
    equal, higher = [0] * len(least), [0] * len(least)  # to the bound; than ``high``
    for index, (tensor, candidates, sure) in enumerate(zip(tensors, among, least, strict=True)):
        scores = score(tensor)
        if sure:
            others = ~top_k(scores, sure, candidates)
            candidates = others if candidates is None else others.logical_and_(candidates)
        values, higher[index] = _between(scores, candidates, bound, high)
        if bound is not None:
            bound = bound.to(scores.device)
            above = values != bound
            equal[index] = len(values) - count(above)
            values = values[above]
        best = torch.cat((best.to(values), values))
        owner = torch.cat((owner.to(values.device), torch.full((len(values),), index, device=values.device)))
        wanted = max(0, k - sum(higher))
        if wanted and (len(best) > 2 * wanted or (index + 1 == len(tensors) and len(best) > wanted)):
            bound = _kth(best, wanted, largest=True)
            equal = _members(owner[best == bound], len(least))
            above = torch.le(best, bound).logical_not_()
            best, owner = best[above], owner[above]
    if sum(higher) >= k:
        return higher
    won = [more + n for more, n in zip(higher, _members(owner, len(least)), strict=True)]
    missing = min(k - sum(won), sum(equal))
    shares = apportion(missing, equal, equal) if missing > 0 else [0] * len(least)
    return [n + share for n, share in zip(won, shares, strict=True)]


def _between(scores: Tensor, among: Tensor | None, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, int]:
    """Return the candidates' scores from ``low`` to ``high``, and how many are above; in chunks on the CPU."""
    flat, marks = scores.reshape(-1), None if among is None else among.reshape(-1)
    low, high = (None if bound is None else bound.to(flat.device) for bound in (low, high))
    if low is None and high is None:
        return (flat if marks is None else flat[positions(marks)]), 0
    kept, higher, at_once = [flat[:0]], 0, CHUNK if flat.is_cpu else max(1, len(flat))
    for first in range(0, len(flat), at_once):
        chunk = flat[first : first + at_once]
        inside = None if marks is None else marks[first : first + at_once]
        if low is not None:
            reaches = torch.lt(chunk, low).logical_not_()
            inside = reaches if inside is None else reaches.logical_and_(inside)
        if high is not None:
            within = torch.le(chunk, high)
            higher += len(chunk) if inside is None else count(inside)
            inside = within if inside is None else within.logical_and_(inside)
            higher -= count(inside)
        assert inside is not None
        kept.append(chunk.index_select(0, positions(inside)))
    return torch.cat(kept), higher


def _members(owner: Tensor, owners: int) -> list[int]:
    """Return how often each owner is named."""
    found: list[int] = torch.bincount(owner, minlength=owners).tolist()
    return found


def likely_bound(size: int, k: int, sample: Callable[[int], Iterable[Tensor]]) -> Tensor | None:
    """Return a score that a few more than ``k`` candidates reach, as a sample tells; None if there are few.

    Args:
        size: number of scores in all.
        k: how many.
        sample: gives the candidates' scores, tensor by tensor, at every so-many-th position.
    """
    return _likely_between(size, k, k, sample)[0]


def _likely_between(
    size: int, least: int, most: int, sample: Callable[[int], Iterable[Tensor]]
) -> tuple[Tensor | None, Tensor | None]:
    """Return scores that a few more than ``most`` candidates reach, and a few less than ``least``; None if unknown."""
    if size < _SAMPLED_FROM:
        return None, None
    stride = _stride(size)
    first, *others = sample(stride)
    scores = torch.cat((first, *(other.to(first) for other in others)))
    rank = int(least / stride - 4 * (least / stride + 1) ** 0.5)
    high = _kth(scores, rank, largest=True) if 0 < rank <= len(scores) else None
    return _likely(scores, most / stride, largest=True), high


def largest_or_above(scores: Tensor, level: Tensor, density: float) -> Tensor:
    """Mark the share ``density`` of largest scores, and at least all above ``level``; ``scores`` are overwritten."""
    above = scores > level
    k = round(density * scores.numel())
    return above if int(above.sum()) >= k else top_k(scores.masked_fill_(above, math.inf), k)


def largest(
    blocks: Iterable[tuple[int, Tensor]], k: int, shape: Sequence[int], at_least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the flat positions, ascending, of the ``k`` largest scores of a weight, and these scores; on the CPU.

    The scores come in blocks, and beside the block at hand only the best so far are kept, up to three times ``k``.

    Args:
        blocks: the position of a block's first score in the weight, and its scores ``(n,)``; in ascending order.
        k: how many. Fewer are returned if there are not so many candidates.
        shape: of the weight.
        at_least: candidates are the scores that are not less.

    >>> largest([(0, torch.tensor([2.0, 5.0])), (2, torch.tensor([-1.0, 5.0]))], 2, (2, 2))
    (tensor([1, 3]), tensor([5., 5.]))
    """
    return largest_of((partial(_reaching, first, scores) for first, scores in blocks), k, shape, at_least)


def _reaching(first: int, scores: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    found = reached(scores, bound)
    magnitudes = scores.index_select(0, found)
    return found.add_(first), magnitudes


def largest_of(
    blocks: Iterable[Callable[[float], tuple[Tensor, Tensor]]], k: int, shape: Sequence[int], at_least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Do as ``largest``, where each block tells the positions and the scores that are not less than a bound.

    >>> largest_of([lambda bound: (torch.tensor([1]), torch.tensor([bound + 1]))], 2, (2, 2), 3.0)
    (tensor([1]), tensor([4.]))
    """
    best, places, held = [torch.empty(0)], [torch.empty(0, dtype=torch.long)], 0
    for block in blocks if k else ():
        found, scores = block(at_least)
        if len(found) > k:
            kept = top_k_positions(scores, k, order=ties.at(found, shape))
            found, scores = found.index_select(0, kept), scores.index_select(0, kept)
        best.append(scores)
        places.append(found)
        held += len(found)
        if held >= 2 * k:
            best, places = ([part] for part in _best(best, places, k, shape))
            held, at_least = k, float(best[0].min())
    scores, found = _best(best, places, min(k, held), shape)
    return found.cpu(), scores.cpu()


def _best(scores: list[Tensor], places: list[Tensor], k: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest of several vectors of scores, and the positions in a weight that they belong to."""
    values, found = (torch.cat([part.to(parts[-1]) for part in parts]) for parts in (scores, places))
    kept = top_k_positions(values, k, order=ties.at(found, shape))
    return values.index_select(0, kept), found.index_select(0, kept)


def first_of_rows(scores: Tensor, rows: Outputs | None, among: Tensor | None = None) -> Tensor:
    """Return scores by which a selection leaves no row empty: the largest of each row is infinite.

    Args:
        scores: of a weight, of its shape.
        rows: where they lie; None: any may be empty, and the scores are as they are.
        among: the candidates, a boolean tensor of the same shape; default: all.

    >>> first_of_rows(torch.tensor([[3.0, 4.0], [2.0, 1.0]]), Outputs())
    tensor([[3., inf],
            [inf, 1.]])
    """
    if rows is None:
        return scores
    scores = scores.clone()
    candidates = scores if among is None else scores.masked_fill(~among, -math.inf)
    first = as_matrix(candidates, rows).argmax(1, keepdim=True)
    matrix = as_matrix(scores, rows)
    matrix.scatter_(1, first, math.inf)
    write_matrix(scores, matrix, rows)
    return scores


def positions(mask: Tensor) -> Tensor:
    """Return the flat positions of the True elements, counted as in ``mask.reshape(-1)``, ascending.

    >>> positions(torch.tensor([[False, True], [True, False]]))
    tensor([1, 2])
    """
    return marked(mask.reshape(-1))


def where(tensors: Sequence[Tensor], holds: Callable[..., Tensor]) -> Tensor:
    """Return the flat positions at which a condition holds, ascending; on the CPU in chunks, which take less memory.

    Args:
        tensors: of one shape.
        holds: of elements of each, a boolean tensor of theirs.

    >>> where([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])], torch.gt)
    tensor([1])
    """
    flat = [x.reshape(-1) for x in tensors]
    if not flat[0].is_cpu:
        return positions(holds(*flat))
    chunks = zip(*(torch.split(x, CHUNK) for x in flat), strict=True)
    found = [positions(holds(*chunk)).add_(i * CHUNK) for i, chunk in enumerate(chunks)]
    return torch.cat(found)


def put_(x: Tensor, positions: Tensor, value: float | Tensor) -> None:
    """Write ``value`` at flat positions, counted as in ``x.reshape(-1)`` whatever the layout in memory."""
    if x.is_contiguous() and isinstance(value, Tensor) and value.ndim:
        x.view(-1).index_copy_(0, positions, value)
    elif x.is_contiguous():
        x.view(-1).index_fill_(0, positions, value)
    else:
        x[torch.unravel_index(positions, x.shape)] = value


def zero_outside_(x: Tensor, mask: Tensor) -> None:
    """Set ``x`` to 0 where ``mask`` is False, whatever stands there; in chunks on the CPU, which is quicker.

    The bits are multiplied, as an integer: 0 times what is not finite would not be 0.

    >>> x = torch.tensor([1.5, float("nan"), float("-inf")])
    >>> zero_outside_(x, torch.tensor([True, False, False]))
    >>> x
    tensor([1.5000, 0.0000, 0.0000])
    """
    bits = x.view(INTEGERS[x.element_size()])
    if x.device.type != "cpu" or x.stride() != mask.stride() or x.numel() <= CHUNK:
        bits.mul_(mask)
        return
    values, keeps = as_matrix(bits), as_matrix(mask)
    if values.data_ptr() != x.data_ptr() or keeps.data_ptr() != mask.data_ptr() or not values.is_contiguous():
        bits.mul_(mask)
        return
    buffer = torch.empty(min(CHUNK, x.numel()), dtype=bits.dtype)
    for value, keep in zip(torch.split(values.view(-1), CHUNK), torch.split(keeps.view(-1), CHUNK), strict=True):
        value.mul_(buffer[: len(keep)].copy_(keep))


def _marked(positions: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[positions] = True
    return mask.view(like.shape)


def _extreme(scores: Tensor, k: int, among: Tensor | None, order: ties.Order | None, largest: bool) -> Tensor:
    """Return the flat positions, ascending, of the ``k`` largest (or smallest) scores."""
    if k <= 0:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    flat, marks = scores.reshape(-1), None if among is None else among.reshape(-1)
    some = flat.numel() >= _SAMPLED_FROM and (marks is not None or 2 * k < flat.numel())  # else a bound leaves most
    candidates = _sampled(flat, k, marks, largest) if some else None
    if candidates is None and marks is not None:
        candidates = positions(marks)
    values = flat if candidates is None else flat.index_select(0, candidates)
    if len(values) < k:
        raise ValueError(f"{k} of {len(values)} candidates were asked for.")
    if len(values) == k:
        return torch.arange(k, device=flat.device) if candidates is None else candidates
    bound = _kth(values, k, largest)
    inside = reached(values, bound.item(), largest)
    if len(inside) == k:  # no equals are left over
        return inside if candidates is None else candidates.index_select(0, inside)
    chosen = values > bound if largest else values < bound
    equal = positions(values == bound)
    missing = k - count(chosen)
    if missing > len(equal):  # what is no number equals nothing
        return _extreme(_numbers(scores), k, among, order, largest)
    if missing < len(equal):
        order = order or partial(ties.spread, shape=scores.shape)
        rank = order(equal if candidates is None else candidates[equal])
        equal = equal[_least(rank if largest else -rank, missing)]
    chosen[equal] = True
    found = positions(chosen)
    return found if candidates is None else candidates.index_select(0, found)


def _least(values: Tensor, k: int) -> Tensor:
    """Mark the ``k`` smallest of a vector, of equals the earlier ones."""
    bound = _kth(values, k, largest=False)
    chosen = values < bound
    chosen[positions(values == bound)[: k - count(chosen)]] = True
    return chosen


def _numbers(scores: Tensor) -> Tensor:
    """Return scores with infinity where they are NaN."""
    return scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _kth(values: Tensor, k: int, largest: bool) -> Tensor:
    rank = len(values) - k + 1 if largest else k
    if torch.are_deterministic_algorithms_enabled() and values.is_cuda:  # where torch refuses kthvalue
        return values.sort().values[rank - 1]
    if values.is_cpu and values.dtype in _NUMPY:  # up to ten times as fast as torch's
        return torch.from_numpy(np.partition(values.numpy(), rank - 1)[rank - 1 : rank]).view(())
    return values.kthvalue(rank).values


def _sampled(flat: Tensor, k: int, among: Tensor | None, largest: bool) -> Tensor | None:
    """Return positions that hold the ``k`` extreme ones and not many more, by a bound from a sample; None if it fails.

    A selection among millions costs many times a comparison with a bound.
    """
    stride = _stride(flat.numel())
    sample = flat[::stride]
    if among is not None:
        sample = sample[among[::stride]]
    bound = _likely(sample, k / stride, largest)
    if bound is None:
        return None
    beyond = torch.lt if largest else torch.gt
    if among is None:
        candidates = reached(flat, bound.item(), largest)
    else:  # also what is no number
        candidates = where([flat, among], lambda x, among: beyond(x, bound).logical_not_().logical_and_(among))
    return candidates if len(candidates) >= k else None


def _stride(size: int) -> int:
    """Return a distance at which some thousand scores are a sample; odd, so that most columns are in it."""
    return (size >> 14) | 1


def _likely(sample: Tensor, expected: float, largest: bool) -> Tensor | None:
    """Return the score that ``expected`` elements of the sample reach, and four standard deviations more of them."""
    rank = int(expected + 4 * (expected + 1) ** 0.5) + 1
    return _kth(sample, rank, largest) if rank < len(sample) else None
