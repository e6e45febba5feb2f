"""Masks: small ones worked out by hand, exact counts for the rest."""

import math

import pytest
import torch
from helpers import Lit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sparse import DFBST, DST, STR, AutoSparse
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules.budgets import apportion
from lightning_sparse.rules.select import (
    count_global_top_k,
    largest_or_above,
    lowest_positions,
    positions,
    put_,
    top_k,
    top_k_positions,
    zero_outside_,
)
from lightning_sparse.rules.ties import spread


def attached(callback, W, **thresholds):
    """A callback that has taken over one weight, with thresholds as given."""
    module = nn.Linear(W.shape[1], W.shape[0], bias=False)
    module.weight.data = W.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=1e-9)

    callback.attach(select_parameters(module), [optimizer], resumed=False)
    weight = callback._weights["weight"]
    for key, value in thresholds.items():
        weight.thresholds[key].data.copy_(torch.tensor(value))
    with torch.no_grad():
        callback._projection.project([weight])
    return module, optimizer, weight


W = torch.tensor([[0.5, -0.2, 0.1], [-0.3, 0.3, 0.05]])


def test_dst_keeps_weights_strictly_above_their_neurons_threshold():
    module, _, _ = attached(DST(alpha=0), W, t=[0.15, 0.3])
    assert module.weight.tolist() == (W * torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist()


def test_dfbst_uses_the_thresholds_magnitude():
    module, _, _ = attached(DFBST(alpha=0, beta=0), W, t=[-0.15, 0.2])
    assert module.weight.tolist() == (W * torch.tensor([[1, 1, 0], [1, 1, 0]])).tolist()


@pytest.mark.parametrize("callback", [STR(-5), AutoSparse()])
def test_soft_thresholding_shrinks_survivors_by_the_threshold(callback):
    s = torch.logit(torch.tensor([0.15]))  # T = 0.15
    module, _, _ = attached(callback, W, t=s.tolist())
    assert torch.allclose(module.weight, torch.tensor([[0.35, -0.05, 0], [-0.15, 0.15, 0]]), atol=1e-7)
    assert callback.masks["weight"].tolist() == [[True, True, False], [True, True, False]]


def test_dst_gradients_are_those_worked_out_by_hand():
    callback = DST(alpha=0)
    module, optimizer, weight = attached(callback, W, t=[0.15, 0.3])
    module.weight.grad = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0]])
    callback.before_step(optimizer, 1.0, 1.0)
    # |Q|: 0.35 0.05 0.05 / 0 0 0.25, so H: 0.6 1.8 1.8 / 2 2 1; M: 1 1 0 / 0 0 0; dW = dP (M + |W| H)
    expected = [[1 * (1 + 0.3), 2 * (1 + 0.36), -1 * 0.18], [0, 1 * 0.6, 1 * 0.05]]
    assert torch.allclose(module.weight.grad, torch.tensor(expected))
    # dt = -sum dP W H
    expected = [-(1 * 0.5 * 0.6 + 2 * -0.2 * 1.8 + -1 * 0.1 * 1.8), -(0.6 + 0.05)]
    assert torch.allclose(weight.thresholds["t"].grad, torch.tensor(expected))


def test_dst_penalty_pushes_thresholds_up_by_alpha_exp_minus_t():
    callback = DST(alpha=0.1)
    module, optimizer, weight = attached(callback, W, t=[0.15, 0.3])
    module.weight.grad = torch.zeros(2, 3)
    callback.before_step(optimizer, 1.0, 1.0)
    assert torch.allclose(weight.thresholds["t"].grad, -0.1 * torch.exp(-torch.tensor([0.15, 0.3])))


def test_dfbst_masks_gradients_by_their_share_of_the_row():
    callback = DFBST(alpha=0, beta=0)
    module, optimizer, _ = attached(callback, W, t=[0.0, 0.0], t_b=[0.25, -0.4])
    module.weight.grad = torch.tensor([[6.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    callback.before_step(optimizer, 1.0, 1.0)
    # Q = |W|; H: 2-2=.4 (at 0.5), 1.2, 1.6; dW = dP (1 + |W| H): 7.2, -3.72, 1.16: shares 0.60 0.31 0.10
    assert torch.allclose(module.weight.grad, torch.tensor([[7.2, -3.72, 0.0], [0.0, 0.0, 0.0]]))
    assert callback.backward_masks["weight"].tolist() == [[True, True, False], [False, False, False]]
    assert callback.backward_density == pytest.approx(2 / 6)


def test_autosparse_scales_gradients_of_inactive_weights_by_alpha():
    callback = AutoSparse(alpha=0.25, decay="none")
    module, optimizer, weight = attached(callback, W, t=torch.logit(torch.tensor([0.15])).tolist())
    module.weight.grad = torch.tensor([[1.0, 2.0, -4.0], [8.0, 1.0, 4.0]])
    callback.before_step(optimizer, 1.0, 1.0)
    dW = torch.tensor([[1.0, 2.0, -1.0], [8.0, 1.0, 1.0]])
    assert torch.allclose(module.weight.grad, dW)
    assert torch.allclose(weight.thresholds["t"].grad, -0.15 * 0.85 * (dW * W.sign()).sum().view(1))


def test_guard_acts_above_its_bound_and_not_at_it():
    W = torch.ones(10, 10)
    W[0, 0] = 3
    for bound, expected in ((0.99, 2.0), (0.989, 0.0)):  # 99 of 100 are masked: just 0.99, or more than 0.989
        callback = DST(alpha=0, granularity="layer", reset_above=bound)
        module, _, weight = attached(callback, W, t=[2.0])
        assert weight.thresholds["t"].item() == expected
        assert int((module.weight != 0).sum()) == (1 if expected else 100)
    callback = DST(alpha=0, granularity="layer", reset_above=None)
    module, _, weight = attached(callback, W, t=[5.0])
    assert weight.thresholds["t"].item() == 5
    assert not module.weight.any()


def test_top_k_spreads_over_rows_and_columns_among_ties():
    scores = torch.tensor([[2.0, 1.0, 2.0], [2.0, 0.0, 3.0]])
    assert spread(torch.arange(6), (2, 3)).tolist() == [0, 2, 4, 3, 5, 1]
    assert top_k(scores, 2).tolist() == [[True, False, False], [False, False, True]]
    assert top_k(scores, 3).tolist() == [[True, False, False], [True, False, True]]
    assert top_k(torch.ones(2, 3), 2).tolist() == [[True, False, False], [False, False, True]]
    assert lowest_positions(torch.ones(2, 3), 4).tolist() == [1, 2, 3, 4], "the other four"
    assert not top_k(scores, 0).any()
    assert top_k(scores, 6).all()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_k_marks_exactly_the_k_largest(values, draw):
    k = draw.draw(st.integers(0, len(values)))
    mask = top_k(torch.tensor(values, dtype=torch.float32), k)
    rank = spread(torch.arange(len(values)), (len(values),)).tolist()
    best = sorted(range(len(values)), key=lambda i: (-values[i], rank[i]))[:k]
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(best)


def test_backward_set_holds_at_least_the_active_weights():
    magnitude = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert largest_or_above(magnitude, torch.tensor([[2.5]]), 0.75).tolist() == [[True, True, True, False]]
    assert largest_or_above(magnitude, torch.tensor([[0.5]]), 0.25).tolist() == [[True] * 4]


def test_masks_densities_and_sparsity_agree():
    callback = DST(alpha=0)
    attached(callback, W, t=[0.15, 0.3])
    assert callback.layer_density == {"weight": 2 / 6}
    assert callback.density == pytest.approx(2 / 6)
    assert callback.sparsity == pytest.approx(4 / 6)
    assert callback.masks["weight"].dtype == torch.bool


@pytest.mark.parametrize("read", [lambda c: c.density, lambda c: c.sparsity])
@pytest.mark.parametrize("callback", [DST(alpha=0), DFBST(0, 0), AutoSparse(), STR(-5)])
def test_density_before_any_fit_says_that_there_is_none(callback, read):
    with pytest.raises(RuntimeError, match="has no weights yet"):
        read(callback)
    assert Lit().net[0].weight.ndim == 2
    assert callback.masks == {}


LARGE = {
    "different": lambda g: torch.randn(300_000, generator=g),
    "many ties": lambda g: torch.randint(0, 5, (300_000,), generator=g).float(),
    "nearly all equal": lambda g: (torch.rand(300_000, generator=g) < 1e-3).float(),
    "all equal": lambda g: torch.zeros(300_000),
    "sorted": lambda g: torch.arange(300_000.0),
    "large only where no sample looks": lambda g: (torch.arange(300_000) % 18).float(),
}


def ranked(scores, candidates, shape):
    """Positions from the largest score to the smallest, of equals in the order of ties."""
    order = candidates[spread(candidates, shape).sort().indices]
    return order[torch.sort(scores.reshape(-1)[order], stable=True, descending=True).indices]


@pytest.mark.parametrize("k", [1, 100, 29_999, 150_000, 269_999])
@pytest.mark.parametrize("kind", LARGE)
def test_selections_among_many_are_those_of_a_stable_sort(kind, k):
    generator = torch.Generator().manual_seed(0)
    scores = LARGE[kind](generator).view(500, 600)
    among = torch.rand(500, 600, generator=generator) < 0.95
    order = ranked(scores, among.reshape(-1).nonzero().squeeze(1), scores.shape)
    assert torch.equal(top_k_positions(scores, k, among), order[:k].sort().values)
    assert torch.equal(lowest_positions(scores, k, among), order[-k:].sort().values)
    order = ranked(scores, torch.arange(300_000), scores.shape)
    assert torch.equal(top_k(scores, k).reshape(-1).nonzero().squeeze(1), order[:k].sort().values)


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("broken", [1, 4, 9])
def test_what_is_no_number_counts_as_infinitely_large(size, broken):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(0))
    nan = torch.arange(broken) * (size // 10)
    scores[nan] = math.nan
    for k in (1, 3, 7, size - 2):
        chosen = top_k(scores, k)
        assert chosen.sum() == k
        assert chosen[nan].sum() == min(k, broken)
        low = lowest_positions(scores, k)
        assert len(low.unique()) == k
        assert scores[low].isnan().sum() == max(0, k + broken - size)
        everywhere = [torch.ones(size, dtype=torch.bool), torch.ones(5, dtype=torch.bool)]
        counts = count_global_top_k([scores, torch.full((5,), -9.0)], k, everywhere)
        assert counts == [k, 0]


@pytest.mark.parametrize("k", [1, 100, 29_999, 150_000, 269_999])
@pytest.mark.parametrize("kind", LARGE)
def test_counts_among_many_are_those_above_the_last_and_a_share_of_its_equals(kind, k):
    generator = torch.Generator().manual_seed(0)
    scores = LARGE[kind](generator)
    among = torch.rand(300_000, generator=generator) < 0.95
    sizes = [1000, 200_000, 0, 9000, 90_000]
    bound = scores[among].abs().sort(descending=True).values[k - 1]
    parts = scores.split(sizes), among.split(sizes)
    above, equal = (
        [int((compare(part.abs(), bound) & candidates).sum()) for part, candidates in zip(*parts, strict=True)]
        for compare in (torch.gt, torch.eq)
    )
    shares = apportion(k - sum(above), equal, equal)
    expected = [n + share for n, share in zip(above, shares, strict=True)]
    assert count_global_top_k(parts[0], k, parts[1], score=torch.abs) == expected


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 3), (600, 700)])
def test_zeroing_outside_a_mask_is_a_product_with_it_in_any_layout(shape):
    torch.manual_seed(0)
    x, mask = torch.randn(shape), torch.rand(shape) < 0.5
    layouts = [(x.clone(), mask)]
    if len(shape) == 4:
        last = torch.channels_last
        layouts += [(x.contiguous(memory_format=last), mask.contiguous(memory_format=last))]
        layouts += [(x.contiguous(memory_format=last), mask)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for values, keep in layouts:
            y = values.to(dtype)
            zero_outside_(y, keep)
            assert torch.equal(y, x.to(dtype) * mask)
            assert y.stride() == values.stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeroing_outside_a_mask_leaves_exact_zeros_whatever_stood_there(dtype, value):
    mask = torch.tensor([[True, False], [False, True]])
    for keep in (mask, mask.t()):  # the latter in another layout
        x = torch.tensor([[1.5, value], [value, value]], dtype=dtype)
        zero_outside_(x, keep)
        assert x.reshape(-1)[:3].tolist() == [1.5, 0.0, 0.0]
        assert not x[1, 1].isfinite(), "what is kept stays in sight"


@pytest.mark.parametrize("density", [0.0, 0.001, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("size", [5, (1 << 17) + 3, 1 << 18])
def test_positions_are_those_of_nonzero(size, density):
    mask = torch.rand(size + 1, generator=torch.Generator().manual_seed(0)) < density
    for part in (mask[:size], mask[1:]):  # the latter not aligned to eight bytes
        assert torch.equal(positions(part), part.nonzero().squeeze(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_are_put_at_positions_as_in_reshape(layout):
    x = torch.zeros(2, 3, 2, 2).to(memory_format=layout)
    put_(x, torch.tensor([0, 5, 23]), torch.tensor([1.0, 2.0, 3.0]))
    put_(x, torch.tensor([7]), 4.0)
    expected = torch.zeros(24)
    expected[[0, 5, 7, 23]] = torch.tensor([1.0, 2.0, 4.0, 3.0])
    assert torch.equal(x.reshape(-1), expected)
    assert x.is_contiguous(memory_format=layout)
