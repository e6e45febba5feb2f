"""Thresholding in pure torch.

Every function works on matrices ``(out, n)`` and thresholds ``tau`` of shape ``(out, 1)`` or ``(out, n)``. On CPU the
rows are taken in chunks that stay in the cache, all arithmetic is in place on reused buffers, and no boolean tensor
takes part in it (a product with a boolean tensor is about ten times slower than one of floats).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["backward_mask", "hard_gradient", "hard_project", "soft_gradient", "soft_project"]

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


def _surrogate_(x: Tensor, spare: Tensor) -> Tensor:
    """Replace ``x >= 0`` by ``H(x)``, the long-tailed derivative of the step (DST, Eq. 3)."""
    if x.device.type == "cpu" and x.amax() <= 1:  # nearly always: to look is cheaper than to mask
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


def hard_gradient(dP: Tensor, W: Tensor, tau: Tensor) -> Tensor:
    """Replace ``dP`` by ``dW = dP (M + |W| H(Q))`` and return ``dtau = -sum dP W H(Q)``, with ``Q = |W| - tau``."""
    dtau = torch.empty_like(tau)
    for rows in _chunks(W):
        w, g = W[rows].to(tau.dtype), dP[rows].to(tau.dtype)
        mask = torch.abs(w, out=_buffer(w, 0)).sub_(tau[rows])
        h = torch.abs(mask, out=_buffer(w, 1))
        mask.gt_(0)
        h = _surrogate_(h, _buffer(w, 2)).mul_(w)
        dtau[rows] = _row_dot(g, h, _buffer(w, 2)) if tau.shape[1] == 1 else g * h
        g.mul_(mask.add_(h.abs_()))
        if dP.dtype != tau.dtype:
            dP[rows] = g.to(dP.dtype)
    return dtau.neg_()


def soft_project(W: Tensor, tau: Tensor, out: Tensor) -> None:
    """Write ``sign(W) max(|W| - tau, 0)`` into ``out``."""
    for rows in _chunks(W):
        w, t = W[rows].to(tau.dtype), tau[rows]
        within = torch.maximum(w, -t, out=_buffer(w, 0))
        out[rows] = torch.sub(w, torch.minimum(within, t, out=within), out=within)


def soft_gradient(dP: Tensor, W: Tensor, tau: Tensor, alpha: float) -> Tensor:
    """Replace ``dP`` by ``dW = dP A`` and return ``dtau = -sum dP sign(W) A``: A is 1 if ``|W| > tau``, else alpha."""
    dtau = torch.empty_like(tau)
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
    return dtau.neg_()


def backward_mask(G: Tensor, tau: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask a gradient by contribution scores (DFBST, Sec. 3.3).

    With ``d = |G| / sum_j |G| - tau``: ``mask = 1[d >= 0]``, and ``G`` becomes ``G * mask``.

    Returns:
        ``sum_j G~ G H(d)`` and ``sum_j G H(d)``, each ``(out, 1)`` (``(out, n)`` unsummed where ``tau`` is), which the
        gradient of the variance penalty is made of, and the pair ``(sum G~, sum G~^2)`` over everything in float64.
    """
    weighted, plain = torch.empty_like(tau), torch.empty_like(tau)
    moments = torch.zeros(2, dtype=torch.float64, device=G.device)
    for rows in _chunks(G):
        g = G[rows].to(tau.dtype)
        kept = torch.abs(g, out=_buffer(g, 0))
        total = kept.sum(1, keepdim=True)
        kept.mul_(total.masked_fill_(total == 0, 1).reciprocal_()).sub_(tau[rows])
        gh = torch.abs(kept, out=_buffer(g, 1))
        gh = _surrogate_(gh, _buffer(g, 2)).mul_(g)
        kept.ge_(0)
        mask[rows] = kept
        if tau.shape[1] == 1:
            plain[rows] = gh.sum(1, keepdim=True)
            g.mul_(kept)
            weighted[rows] = _row_dot(g, gh, _buffer(g, 2))
        else:
            plain[rows] = gh
            g.mul_(kept)
            weighted[rows] = g * gh
        moments += torch.stack((g.sum(), g.reshape(-1).dot(g.reshape(-1)))).double()
        if G.dtype != tau.dtype:
            G[rows] = g.to(G.dtype)
    return weighted, plain, moments
