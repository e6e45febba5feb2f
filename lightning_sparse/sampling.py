"""Which connections to look at, and their gradients, without ever building the dense matrix: pure functions of tensors.

A connection is its flat position in a weight of shape ``(out, in / groups, *kernel)``. Time and memory go with the
numbers of active and of sampled connections, not with the size of the weight. All draws are made on the CPU.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from lightning_sparse.masks import positions

__all__ = [
    "conv_gradient",
    "conv_gradient_rows",
    "distinct",
    "draw",
    "free_positions",
    "linear_gradient",
    "linear_gradient_rows",
    "merged",
    "places_merged",
    "probabilities",
    "subset",
    "unit_sums",
]

_ROUNDS = 64  # of drawing and rejecting, before what is missing is filled up uniformly
_BATCH, _AT_ONCE = 1 << 10, 1 << 18  # draws of a round, at least and at most
_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 22  # elements that a gradient multiplies at once


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


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return two ascending vectors without common elements as one, ascending.

    >>> merged(torch.tensor([1, 4, 6]), torch.tensor([0, 5]))
    tensor([0, 1, 4, 5, 6])
    """
    whole = torch.empty(len(a) + len(b), dtype=a.dtype)
    for places, part in zip(places_merged(a, b), (a, b), strict=True):
        whole[places] = part
    return whole


def places_merged(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the elements of two ascending vectors without common ones come to stand in ``merged(a, b)``.

    >>> places_merged(torch.tensor([1, 4, 6]), torch.tensor([0, 5]))
    (tensor([1, 2, 4]), tensor([0, 3]))
    """
    of_b = torch.searchsorted(a, b) + torch.arange(len(b))
    others = torch.ones(len(a) + len(b), dtype=torch.bool)
    others[of_b] = False
    return positions(others), of_b


def distinct(n: int, below: int, generator: Generator) -> Tensor:
    """Draw ``n`` different whole numbers from 0 to ``below - 1``, ascending, all equally likely; memory goes with n."""
    if 2 * n >= below:
        return torch.randperm(below, generator=generator)[:n].sort().values
    found = torch.empty(0, dtype=torch.long)
    while len(found) < n:  # at least every other draw is a new one
        drawn = torch.cat((found, torch.randint(below, (n - len(found),), generator=generator))).numpy()
        drawn.sort()  # in place: torch's takes several times the memory
        new = np.ones(n, bool)
        np.not_equal(drawn[1:], drawn[:-1], out=new[1:])
        found = torch.from_numpy(drawn[new])
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


# ---------------------------------------------------------------------- gradients of some connections


def linear_gradient(h: Tensor, delta: Tensor, positions: Tensor, chunk: int | None = None) -> Tensor:
    """Return the gradient of some connections of a linear layer: ``sum_b h[b, a] delta[b, o]``.

    Args:
        h: the layer's input, ``(..., in)``.
        delta: the gradient of the loss with respect to its output, ``(..., out)``.
        positions: flat ones in the weight ``(out, in)``.
        chunk: number of products formed at once, which bounds the memory needed; default: after the device.
    """
    width = h.shape[-1]
    a, o = positions % width, positions.div(width, rounding_mode="floor")
    inputs = h.reshape(-1, width).t().contiguous()  # what a connection needs lies together
    outputs = delta.reshape(-1, delta.shape[-1]).t().contiguous()
    dtype, at_once = torch.promote_types(delta.dtype, torch.float32), _at_once(chunk, h, inputs.shape[1])
    parts = [
        inputs[some_a].to(dtype).mul_(outputs[some_o]).sum(1)
        for some_a, some_o in zip(torch.split(a, at_once), torch.split(o, at_once), strict=True)
    ]
    return torch.cat(parts)


def conv_gradient(
    h: Tensor,
    delta: Tensor,
    positions: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    chunk: int | None = None,
) -> Tensor:
    """Return the gradient of some connections of a convolution: ``sum_{b, y} h[b, a, s y + d k] delta[b, o, y]``.

    Args:
        h: the layer's input, ``(batch, in, *space)``.
        delta: the gradient of the loss with respect to its output, ``(batch, out, *space)``.
        positions: flat ones in the weight.
        shape: of the weight, ``(out, in / groups, *kernel)``.
        stride: as in the layer, like all that follow, a number for each dimension of space.
        padding: or ``"same"``, ``"valid"``.
        dilation: see there.
        groups: see there.
        padding_mode: see there.
        chunk: number of products formed at once, which bounds the memory needed beside the padded input; default:
            after the device.
    """
    out, per_group, *kernel = shape
    h = _padded(h, kernel, padding, dilation, padding_mode)
    places = math.prod(kernel)
    k, pair = positions % places, positions.div(places, rounding_mode="floor")
    o = pair.div(per_group, rounding_mode="floor")
    a = pair % per_group + o.div(out // groups, rounding_mode="floor") * per_group
    gradient = delta.new_zeros(len(positions), dtype=torch.promote_types(delta.dtype, torch.float32))
    for place in torch.unique(k).tolist():
        here = k == place
        window = (slice(None), slice(None), *_windows(place, kernel, stride, dilation, delta.shape[2:]))
        gradient[here] = _products(h[window], delta, a[here], o[here], chunk)
    return gradient


def linear_gradient_rows(h: Tensor, delta: Tensor, rows: slice) -> Tensor:
    """Return the gradient of some rows of a linear layer's weight, ``(rows, in)``; other arguments as above."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    outputs = delta.reshape(-1, delta.shape[-1])[:, rows]
    return outputs.t().to(dtype) @ h.reshape(-1, h.shape[-1]).to(dtype)


def conv_gradient_rows(
    h: Tensor,
    delta: Tensor,
    rows: slice,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    chunk: int | None = None,
) -> Tensor:
    """Return the gradient of some filters of a 2-d convolution, ``(rows, in / groups, *kernel)``.

    Arguments as in ``conv_gradient``, but ``chunk``: elements of the unfolded input at once, if one image has not more.
    """
    out, per_group, *kernel = shape
    dtype = torch.promote_types(delta.dtype, torch.float32)
    h = _padded(h, kernel, padding, dilation, padding_mode)
    at_once = _at_once(chunk, h, h[:1].numel() * math.prod(kernel))
    gradient = torch.zeros(rows.stop - rows.start, per_group, *kernel, dtype=dtype, device=h.device)
    for images, outputs in zip(torch.split(h, at_once), torch.split(delta, at_once), strict=True):
        for group in range(rows.start * groups // out, (rows.stop - 1) * groups // out + 1):
            low, high = max(rows.start, group * out // groups), min(rows.stop, (group + 1) * out // groups)
            inputs = images[:, group * per_group : (group + 1) * per_group].to(dtype)
            size, deltas = (high - low, per_group, *kernel), outputs[:, low:high].to(dtype)
            part = conv2d_weight(inputs, size, deltas, stride, 0, dilation)  # type: ignore[no-untyped-call]
            gradient[low - rows.start : high - rows.start] += part
    return gradient


def _products(h: Tensor, delta: Tensor, a: Tensor, o: Tensor, chunk: int | None) -> Tensor:
    """Sum ``h[b, a, ...] delta[b, o, ...]`` over all but the connections."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    over = [d for d in range(delta.ndim) if d != 1]
    at_once = _at_once(chunk, h, delta.numel() // delta.shape[1])
    parts = [
        h[:, some_a].to(dtype).mul_(delta[:, some_o]).sum(over)
        for some_a, some_o in zip(torch.split(a, at_once), torch.split(o, at_once), strict=True)
    ]
    return torch.cat(parts)


def _at_once(chunk: int | None, x: Tensor, size: int) -> int:
    """Return how many things of this size make up a chunk: one at least."""
    return max(1, (chunk or (_CHUNK if x.is_cpu else _GPU_CHUNK)) // max(1, size))


def _padded(
    h: Tensor, kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int], mode: str
) -> Tensor:
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(p, p) for p in padding]
    flat = [side for pair in reversed(sides) for side in pair]
    return functional.pad(h, flat, mode="constant" if mode == "zeros" else mode) if any(flat) else h


def _windows(
    place: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], outputs: Sequence[int]
) -> list[slice]:
    """Return what the place in the kernel with this flat number reads, as one slice per dimension of space."""
    windows = []
    for size, s, d, length in reversed(list(zip(kernel, stride, dilation, outputs, strict=True))):
        place, k = divmod(place, size)
        windows.append(slice(k * d, k * d + s * (length - 1) + 1, s))
    return windows[::-1]
