"""Boolean masks: pure functions of tensors. Counts are exact, and among equal scores the earlier position wins."""

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

from lightning_sparse.layers import as_matrix

__all__ = ["count", "count_global_top_k", "global_top_k", "lowest", "random", "top_k", "zero_outside_"]

_CHUNK = 1 << 18
_SAMPLED_FROM = 1 << 17


def count(mask: Tensor) -> int:
    """Return the number of True elements."""
    return int(torch.count_nonzero(mask))


def top_k(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Mark exactly the ``k`` largest scores.

    Args:
        scores: any shape, no NaN.
        k: from 0 to the number of candidates.
        among: the candidates, a boolean tensor of the same shape; default: all.

    >>> top_k(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    return _extreme(scores, k, among, largest=True)


def lowest(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Mark exactly the ``k`` smallest scores; arguments as in ``top_k``."""
    return _extreme(scores, k, among, largest=False)


def random(among: Tensor, k: int, generator: Generator) -> Tensor:
    """Mark exactly ``k`` of the positions that are True in ``among``, each with the same probability.

    Drawn on the CPU, so that every device and every process with the same generator gets the same.
    """
    if k == count(among):
        return among.clone()
    mask = torch.zeros(among.numel(), dtype=torch.bool)
    if k > 0:
        candidates = among.reshape(-1).cpu().nonzero().squeeze(1)
        mask[candidates[torch.randperm(len(candidates), generator=generator)[:k]]] = True
    return mask.view(among.shape).to(among.device)


def global_top_k(scores: Sequence[Tensor], k: int, among: Sequence[Tensor], at_least: Sequence[int]) -> list[Tensor]:
    """Mark exactly the ``k`` largest scores of all tensors together, but in each tensor its ``at_least`` largest.

    The tensors are taken one after the other, and only the largest ``k`` so far are kept: never all at once.
    """
    counts = count_global_top_k(scores, k, among, at_least)
    return [top_k(s, n, a) for s, n, a in zip(scores, counts, among, strict=True)]


def count_global_top_k(
    scores: Iterable[Tensor], k: int, among: Sequence[Tensor], at_least: Sequence[int] | None = None
) -> list[int]:
    """Return how many of the ``k`` largest scores of all tensors together lie in each of them.

    The tensors are taken one after the other, and only the largest ``k`` so far are kept (GGR, Sec. 3.3). Given
    ``at_least``, so many of each tensor's largest are among the ``k`` in any case.
    """
    least = [0] * len(among) if at_least is None else list(at_least)
    k -= sum(least)
    if k == 0:
        return least
    best = torch.empty(0)
    owner = torch.empty(0, dtype=torch.long)
    for index, (score, candidates, sure) in enumerate(zip(scores, among, least, strict=True)):
        if sure:
            candidates = candidates & ~top_k(score, sure, candidates)
        flat, where = score.reshape(-1), candidates.reshape(-1)
        if len(best) == k:  # what is not above the smallest kept cannot win, the earlier tensor having precedence
            where = where & (flat > best.min())
        n = min(k, count(where))
        values = flat[_positions(flat, n, where)] if n else flat[:0]
        best = torch.cat((best.to(values), values))
        owner = torch.cat((owner.to(values.device), torch.full((n,), index, device=values.device)))
        if len(best) > k:
            keep = _positions(best, k, None)
            best, owner = best[keep], owner[keep]
    won: list[int] = torch.bincount(owner, minlength=len(least)).tolist()
    return [sure + extra for sure, extra in zip(least, won, strict=True)]


def zero_outside_(x: Tensor, mask: Tensor) -> None:
    """Set ``x`` to 0 where ``mask`` is False; in chunks on the CPU, where a product with booleans is slow."""
    if x.device.type != "cpu" or x.stride() != mask.stride():
        x.mul_(mask)
        return
    values, keeps = as_matrix(x), as_matrix(mask)
    if values.data_ptr() != x.data_ptr() or keeps.data_ptr() != mask.data_ptr() or not values.is_contiguous():
        x.mul_(mask)
        return
    buffer = torch.empty(min(_CHUNK, x.numel()), dtype=x.dtype)
    for value, keep in zip(torch.split(values.view(-1), _CHUNK), torch.split(keeps.view(-1), _CHUNK), strict=True):
        value.mul_(buffer[: len(keep)].copy_(keep))


def _extreme(scores: Tensor, k: int, among: Tensor | None, largest: bool) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if k > 0:
        mask[_positions(scores.reshape(-1), k, None if among is None else among.reshape(-1), largest)] = True
    return mask.view(scores.shape)


def _positions(flat: Tensor, k: int, where: Tensor | None, largest: bool = True) -> Tensor:
    """Return the positions, ascending, of the ``k`` largest (or smallest) elements of a vector."""
    candidates = _sampled(flat, k, where, largest) if flat.numel() >= _SAMPLED_FROM else None
    if candidates is None and where is not None:
        candidates = where.nonzero().squeeze(1)
    values = flat if candidates is None else flat[candidates]
    if len(values) < k:
        raise ValueError(f"{k} of {len(values)} candidates were asked for.")
    if len(values) == k:
        return torch.arange(k, device=flat.device) if candidates is None else candidates
    bound = _kth(values, k, largest)
    chosen = values > bound if largest else values < bound
    ties = (values == bound).nonzero().squeeze(1)
    chosen[ties[: k - count(chosen)]] = True
    return chosen.nonzero().squeeze(1) if candidates is None else candidates[chosen]


def _kth(values: Tensor, k: int, largest: bool) -> Tensor:
    return values.kthvalue(len(values) - k + 1 if largest else k).values


def _sampled(flat: Tensor, k: int, where: Tensor | None, largest: bool) -> Tensor | None:
    """Return positions that hold the ``k`` extreme ones and not many more, by a bound from a sample; None if it fails.

    A selection among millions costs many times a comparison with a bound.
    """
    stride = max(1, flat.numel() >> 14)
    sample = flat[::stride]
    if where is not None:
        sample = sample[where[::stride]]
    expected = k / stride
    rank = int(expected + 4 * (expected + 1) ** 0.5) + 1  # four standard deviations on the safe side
    if rank >= len(sample):
        return None
    bound = _kth(sample, rank, largest)
    within = flat >= bound if largest else flat <= bound
    if where is not None:
        within &= where
    candidates = within.nonzero().squeeze(1)
    return candidates if len(candidates) >= k else None
