"""Thresholding in pure torch.

Functions work on matrices ``(out, n)`` and thresholds ``tau`` of shape ``(out, 1)`` or ``(out, n)``, or on vectors of
thresholds. On CPU the rows are taken in chunks that stay in the cache, all arithmetic is in place on reused buffers,
and no boolean tensor takes part in it (a product with a boolean tensor is about ten times slower than one of floats).
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.kernels.bits import pack

if TYPE_CHECKING:
    from lightning_sparse.kernels import thresholds_torch as this
    from lightning_sparse.kernels.thresholds import ThresholdKernels

    checked: ThresholdKernels = this

__all__ = [
    "add_rows",
    "backward_mask",
    "exponential_penalty",
    "hard_gradient",
    "hard_project",
    "known_finite",
    "near",
    "occupied",
    "soft_gradient",
    "soft_project",
    "through_abs",
    "through_sigmoid",
    "variance_penalty",
]

#: a row of contributions whose sum is below counts as zeros: the reciprocal of a subnormal sum may be infinite
TINY = 2.0**-126

_CHUNK = 1 << 18
_TWO = {dtype: torch.tensor(2.0, dtype=dtype) for dtype in (torch.float32, torch.float64)}
_buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def _chunks(W: Tensor) -> Iterator[slice]:
    """Yield slices of rows of about 256k elements; all rows at once on an accelerator."""
    out, n = W.shape
    step = max(1, _CHUNK // max(n, 1)) if W.device.type == "cpu" else max(out, 1)
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def _buffer(like: Tensor, index: int) -> Tensor:
    """Return reused memory of the shape and dtype of ``like``: its content is undefined."""
    if like.device.type != "cpu" or like.numel() > _CHUNK:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    key = (like.device, like.dtype, index)
    if key not in _buffers:
        _buffers[key] = torch.empty(_CHUNK, dtype=like.dtype)
    return _buffers[key][: like.numel()].view(like.shape)


def _row_dot(x: Tensor, y: Tensor, spare: Tensor) -> Tensor:
    """Return ``(x * y).sum(1, keepdim=True)``: on CPU much faster than a batched product of vectors."""
    return torch.mul(x, y, out=spare).sum(1, keepdim=True)


def _surrogate_(x: Tensor, spare: Tensor, bound: Tensor) -> Tensor:
    """Replace ``x >= 0`` by ``H(x)``, the long-tailed derivative of the step (DST, Eq. 3).

    ``bound``: if all of it is at most 1, so is ``x``.
    """
    if x.device.type == "cpu" and bound.amax() <= 1:  # nearly always: to look is cheaper than to mask
        return torch.sub(_TWO[x.dtype], x, alpha=4, out=x).clamp_min_(0.4)
    torch.le(x, 1, out=spare)
    return x.mul_(-4).add_(2).clamp_min_(0.4).mul_(spare)


def hard_project(W: Tensor, tau: Tensor, out: Tensor) -> int | Tensor:
    """Write ``W * 1[|W| > tau]`` into ``out``; return how many weights pass (a tensor on an accelerator)."""
    counts = []
    for rows in _chunks(W):
        w = W[rows]
        mask = torch.abs(w, out=_buffer(w, 0))
        mask = mask.gt_(tau[rows]) if tau.dtype == w.dtype else mask.gt(tau[rows]).to(w.dtype)
        torch.mul(w, mask, out=out[rows])
        counts.append(mask.sum(dtype=torch.float32))
    return int(sum(counts)) if W.device.type == "cpu" else torch.stack(counts).sum()


def hard_gradient(dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor) -> None:
    """Replace ``dP`` by ``dW = dP (M + |W| H(Q))`` and write ``dtau = -sum dP W H(Q)``, with ``Q = |W| - tau``."""
    for rows in _chunks(W):
        w, g = W[rows].to(tau.dtype), dP[rows].to(tau.dtype)
        mask = torch.abs(w, out=_buffer(w, 0)).sub_(tau[rows])
        h = torch.abs(mask, out=_buffer(w, 1))
        mask.gt_(0)
        h = _surrogate_(h, _buffer(w, 2), bound=h).mul_(w)
        dtau[rows] = _row_dot(g, h, _buffer(w, 2)) if tau.shape[1] == 1 else g * h
        g.mul_(mask.add_(h.abs_()))
        if dP.dtype != tau.dtype:
            dP[rows] = g.to(dP.dtype)
    dtau.neg_()


def soft_project(W: Tensor, tau: Tensor, out: Tensor, shrinkage: float = 1.0) -> None:
    """Write ``sign(W) (|W| - shrinkage tau) 1[|W| > tau]`` into ``out``; ``shrinkage``: from 0, hard, to 1, soft."""
    for rows in _chunks(W):
        w, t = W[rows].to(tau.dtype), tau[rows]
        within = torch.maximum(w, -t, out=_buffer(w, 0))
        P = torch.sub(w, torch.minimum(within, t, out=within), alpha=shrinkage, out=within)
        out[rows] = P if shrinkage == 1 else P.mul_(torch.abs(w, out=_buffer(w, 1)).gt_(t))


def soft_gradient(dP: Tensor, W: Tensor, tau: Tensor, dtau: Tensor, alpha: float) -> None:
    """Replace ``dP`` by ``dW = dP A`` and write ``dtau = -sum dP sign(W) A``: A is 1 if ``|W| > tau``, else alpha."""
    for rows in _chunks(W):
        w, g = W[rows].to(tau.dtype), dP[rows].to(tau.dtype)
        A = torch.abs(w, out=_buffer(w, 0)).sub_(tau[rows]).gt_(0)
        if alpha != 0:
            A.mul_(1 - alpha).add_(alpha)
        g.mul_(A)
        sign = torch.sign(w, out=_buffer(w, 1))
        dtau[rows] = _row_dot(g, sign, _buffer(w, 0)) if tau.shape[1] == 1 else g * sign
        if dP.dtype != tau.dtype:
            dP[rows] = g.to(dP.dtype)
    dtau.neg_()


def backward_mask(G: Tensor, tau: Tensor, bits: Tensor, weighted: Tensor, plain: Tensor, moments: Tensor) -> None:
    """Mask a gradient by contribution scores (DFBST, Sec. 3.3).

    With ``d = |G| / sum_j |G| - tau`` and ``mask = 1[d >= 0]``, ``G`` becomes ``G~ = G * mask``.

    Args:
        G: the gradient.
        tau: thresholds.
        bits: where ``pack(mask)`` is written.
        weighted: where ``sum_j G~ G H(d)`` is written, as ``tau`` in shape (unsummed if that is ``(out, n)``).
        plain: where ``sum_j G H(d)`` is written, likewise: the gradient of the variance penalty is made of the two.
        moments: ``sum G~`` and ``sum G~^2``, over everything, are added to this pair in float64.
    """
    for rows in _chunks(G):
        g = G[rows].to(tau.dtype)
        kept = torch.abs(g, out=_buffer(g, 0))
        total = kept.sum(1, keepdim=True)
        kept.mul_(total.masked_fill_(total < TINY, 1).reciprocal_()).sub_(tau[rows])
        gh = torch.abs(kept, out=_buffer(g, 1))
        gh = _surrogate_(gh, _buffer(g, 2), bound=tau[rows]).mul_(g)  # a share is at most 1
        kept.ge_(0)
        bits[rows] = pack(kept)
        g.mul_(kept)
        if tau.shape[1] == 1:
            torch.sum(gh, 1, keepdim=True, out=plain[rows])
            torch.sum(gh.mul_(g), 1, keepdim=True, out=weighted[rows])
        else:
            plain[rows] = gh
            torch.mul(g, gh, out=weighted[rows])
        moments += torch.stack((g.sum(), g.reshape(-1).dot(g.reshape(-1))))
        if G.dtype != tau.dtype:
            G[rows] = g.to(G.dtype)


def near(W: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """Return which ``|W|`` lie near a threshold.

    Args:
        W: what is not a number counts as above.
        low: excluded.
        high: included.

    Returns:
        How many ``|W|`` are above ``high``; and those between the two, in their order and in float64.
    """
    above, found = 0, [W.new_empty(0)]
    on_cpu = W.device.type == "cpu"  # where numpy makes boolean arrays ten times as fast as torch
    count: Callable[[Any], Any] = np.count_nonzero if on_cpu else torch.count_nonzero
    for rows in _chunks(W):
        magnitudes = torch.abs(W[rows], out=_buffer(W[rows], 0)).reshape(-1)
        magnitudes = magnitudes.to(torch.promote_types(W.dtype, torch.float32))  # bfloat16 would round the bounds
        x: Any = magnitudes.numpy() if on_cpu else magnitudes
        not_above = x <= high
        above += len(x) - int(count(not_above))
        found.append(torch.as_tensor(x[not_above & (x > low)]))
    return above, torch.cat(found).cpu().double().numpy()


def occupied(P: Tensor) -> tuple[int, Tensor]:
    """Return how many rows of ``P`` have no value but 0; and which have another, or NaN: boolean, ``(out,)``."""
    found = (P != 0).any(1)
    return len(found) - int(found.count_nonzero()), found


def add_rows(x: Tensor, out: Tensor) -> None:
    """Write the sum of ``x (out, 1)`` into ``out (1,)``."""
    torch.sum(x, 0, out=out)


def through_abs(dt: Tensor, t: Tensor) -> None:
    """Make the gradient of the vector ``|t|`` that of ``t``: the derivative is +1 at 0."""
    torch.where(t < 0, -dt, dt, out=dt)


def through_sigmoid(dt: Tensor, t: Tensor) -> None:
    """Make the gradient of the vector ``sigmoid(t)`` that of ``t``."""
    T = torch.sigmoid(t)
    dt.mul_(T).mul_(1 - T)


def exponential_penalty(dt: Tensor, t: Tensor, alpha: float) -> None:
    """Add the gradient of ``alpha sum exp(-t)`` to the vector ``dt``."""
    dt.sub_(torch.neg(t).exp_(), alpha=alpha)


def variance_penalty(weighted: Tensor, plain: Tensor, moments: Tensor, N: int, beta: float) -> None:
    """Make of the sums of ``backward_mask`` the gradient of ``beta std(G~)`` with respect to ``tau`` (DFBST, Sec. 3.4).

    With mean m and unbiased standard deviation s of the N elements of ``G~``, ``dL/dM = beta (G~ - m) G / ((N-1) s)``
    and ``dL/dtau = -sum_j dL/dM H(d)``, which replaces ``weighted``: 0 if s is.
    """
    on_cpu = moments.device.type == "cpu"  # elsewhere, no waiting for the values
    first, second = moments.tolist() if on_cpu else moments.unbind()
    m = first / N
    square = (second - m * first) * (N - 1)  # ((N-1) s)^2
    factor: float | Tensor
    if on_cpu:
        factor = -beta / math.sqrt(square) if 0 < square < math.inf else 0.0
    else:
        factor = square.rsqrt().nan_to_num_(0.0, 0.0, 0.0).mul_(-beta)
    weighted.sub_(plain.mul_(m)).mul_(factor)


def known_finite(x: Tensor) -> bool:
    """Tell whether a vector is known to be finite; there is no waiting for an accelerator to find out."""
    return x.device.type == "cpu" and math.isfinite(x.sum())
