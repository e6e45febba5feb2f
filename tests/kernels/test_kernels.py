"""The two sets of kernels agree with each other and with plain formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sparse.kernels import bits, thresholds_numba, thresholds_torch

MODULES = [thresholds_torch, thresholds_numba]
shapes = st.tuples(st.integers(1, 6), st.integers(1, 40))
seeds = st.integers(0, 10**6)


def draw(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=dtype) * 0.7
    W[torch.rand(shape, generator=generator) < 0.1] = 0
    dP = torch.randn(shape, generator=generator, dtype=dtype)
    tau = torch.rand(shape[0], 1, generator=generator, dtype=dtype)
    return W, dP, tau


@pytest.mark.parametrize("kernels", MODULES)
def test_contributions_of_a_row_with_a_subnormal_sum_are_finite(kernels):
    gradient, tau = torch.tensor([[1e-41, 0.0, -3e-41], [0.0, 0.0, 0.0]]), torch.zeros(2, 1)
    weighted, plain, moments = torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)
    kernels.backward_mask(gradient, tau, torch.empty(2, 1, dtype=torch.uint8), weighted, plain, moments)
    assert all(x.isfinite().all() for x in (gradient, weighted, plain, moments))


def surrogate(x):
    a = x.abs()
    return torch.where(a <= 0.4, 2 - 4 * a, (a <= 1).double() * 0.4)


@pytest.mark.parametrize("kernels", MODULES)
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_hard_threshold_is_the_papers_formula(kernels, shape, seed):
    W, dP, tau = draw(shape, seed)
    Q = W.abs() - tau
    M = (Q > 0).double()
    expected = dP * M + dP * W * surrogate(Q) * W.sign()
    dtau = -(dP * W * surrogate(Q)).sum(1, keepdim=True)

    out, gradient = torch.empty_like(W), dP.clone()
    assert kernels.hard_project(W, tau, out) == M.sum()
    assert torch.equal(out, W * M)
    result = torch.empty_like(tau)
    kernels.hard_gradient(gradient, W, tau, result)
    torch.testing.assert_close(result, dtau, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kernels", MODULES)
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_soft_threshold_is_the_papers_formula(kernels, alpha, shape, seed):
    W, dP, tau = draw(shape, seed)
    A = (W.abs() > tau).double() * (1 - alpha) + alpha

    out, gradient = torch.empty_like(W), dP.clone()
    for shrinkage in (1.0, 0.25, 0.0):
        kernels.soft_project(W, tau, out, shrinkage)
        expected = W.sign() * (W.abs() - shrinkage * tau) * (W.abs() > tau)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-15)
        assert torch.equal(out == 0, W.abs() <= tau)
    dtau = torch.empty_like(tau)
    kernels.soft_gradient(gradient, W, tau, dtau, alpha)
    torch.testing.assert_close(gradient, dP * A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dtau, -(dP * W.sign() * A).sum(1, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", MODULES)
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_backward_mask_is_the_papers_formula(kernels, shape, seed):
    _, G, tau = draw(shape, seed)
    G[0] = 0  # a row without gradient has contribution scores 0
    tau = tau * 0.3
    rows = G.abs().sum(1, keepdim=True)
    d = torch.where(rows > 0, G.abs() / torch.where(rows > 0, rows, 1.0), 0.0) - tau
    M = d >= 0

    gradient, packed = G.clone(), torch.empty_like(bits.pack(M))
    weighted, plain, moments = torch.empty_like(tau), torch.empty_like(tau), torch.zeros(2, dtype=torch.float64)
    kernels.backward_mask(gradient, tau, packed, weighted, plain, moments)
    assert torch.equal(bits.unpack(packed, shape[1]), M)
    assert torch.equal(gradient, G * M)
    torch.testing.assert_close(weighted, (G * M * G * surrogate(d)).sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, (G * surrogate(d)).sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments, torch.stack([(G * M).sum(), (G * M).square().sum()]), rtol=1e-12, atol=1e-12)


def test_dst_on_a_hand_worked_matrix():
    W = torch.tensor([[0.5, -0.2, 0.0], [-1.5, 0.1, 0.3]])
    tau = torch.tensor([[0.2], [0.0]])
    dP = torch.ones(2, 3)
    out = torch.empty_like(W)
    assert thresholds_torch.hard_project(W, tau, out) == 3 + 1
    assert out.tolist() == [[0.5, 0.0, 0.0], pytest.approx([-1.5, 0.1, 0.3])]
    # Q = [[0.3, 0, -0.2], [1.5, 0.1, 0.3]], H = [[0.8, 2, 1.2], [0, 1.6, 0.8]]
    dtau = torch.empty_like(tau)
    thresholds_torch.hard_gradient(dP, W, tau, dtau)
    assert dP.flatten().tolist() == pytest.approx([1 + 0.5 * 0.8, 0.2 * 2, 0, 1, 1 + 0.1 * 1.6, 1 + 0.3 * 0.8])
    assert dtau.flatten().tolist() == pytest.approx([-(0.5 * 0.8 - 0.2 * 2), -(0.1 * 1.6 + 0.3 * 0.8)], abs=1e-6)


@pytest.mark.parametrize("kernels", MODULES)
def test_what_is_not_a_number_stays_visible(kernels):
    W = torch.tensor([[float("nan"), 1.0]])
    tau = torch.full((1, 1), 0.5)
    for project in (kernels.hard_project, kernels.soft_project):
        out = torch.empty_like(W)
        project(W, tau, out)
        assert out[0, 0].isnan()
        assert out[0, 1] != 0
    gradient = torch.tensor([[float("nan"), 1.0]])
    kernels.hard_gradient(gradient, torch.ones(1, 2), tau, torch.empty(1, 1))
    assert gradient[0, 0].isnan()
    gradient = torch.tensor([[float("nan"), 1.0]])
    sums = torch.empty(1, 1), torch.empty(1, 1), torch.zeros(2, dtype=torch.float64)
    kernels.backward_mask(gradient, tau, torch.empty(1, 1, dtype=torch.uint8), *sums)
    assert gradient[0, 0].isnan()


@pytest.mark.parametrize("kernels", MODULES)
@pytest.mark.parametrize("shape", [(1, 300_000), (3, 200_000), (700, 400)])
def test_chunks_and_threads_do_not_change_a_bit(kernels, shape):
    W, dP, tau = draw(shape, 1, torch.float32)
    whole, parts = dP.clone(), dP.clone()
    out, dtau = torch.empty_like(W), torch.empty_like(tau)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kernels.hard_gradient(whole, W, tau, dtau)
        passing = kernels.hard_project(W, tau, out)
    finally:
        torch.set_num_threads(threads)
    rows = torch.empty_like(tau)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        kernels.hard_gradient(parts[one], W[one], tau[one], rows[one])
    assert torch.equal(whole, parts)
    torch.testing.assert_close(dtau, rows)
    assert passing == (W.abs() > tau).sum()
    assert torch.equal(out != 0, (W.abs() > tau) & (W != 0))


@pytest.mark.parametrize("shape", [(3, 200_000), (700, 400)])
def test_compiled_backward_masks_are_the_same_on_any_number_of_threads(shape):
    _, G, tau = draw(shape, 1, torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gradient, packed = G.clone(), torch.empty(shape[0], shape[1] // 8, dtype=torch.uint8)
            sums = torch.empty_like(tau), torch.empty_like(tau), torch.zeros(2, dtype=torch.float64)
            thresholds_numba.backward_mask(gradient, tau * 1e-3, packed, *sums)
            results.append((gradient, packed, *sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@given(shape=shapes, seed=seeds)
def test_bits_are_unpacked_to_the_mask_that_was_packed(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = bits.pack(mask)
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(bits.unpack(packed, shape[1]), mask)
    assert torch.equal(bits.pack(mask.double()), packed)


def test_wrong_choice_of_kernels_is_refused(monkeypatch):
    from lightning_sparse.kernels import dispatch, thresholds

    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", "fortran")
    dispatch.module.cache_clear()
    with pytest.raises(
        ValueError,
        match="LIGHTNING_SPARSE_KERNELS must be 'auto', 'torch', 'numba', 'triton' or 'fused', got 'fortran'",
    ):
        thresholds.for_tensors(torch.zeros(1, 1), torch.zeros(1, 1))
    monkeypatch.undo()
    dispatch.module.cache_clear()


@pytest.mark.parametrize("kernels", MODULES)
@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), seed=seeds)
def test_vectors_of_thresholds_get_the_gradients_of_autograd(kernels, size, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    for inner, function in ((torch.abs, kernels.through_abs), (torch.sigmoid, kernels.through_sigmoid)):
        dt = start.clone()
        function(dt, t.detach())
        torch.testing.assert_close(dt, torch.autograd.grad(inner(t) @ start, t)[0], rtol=1e-12, atol=1e-12)
    dt = start.clone()
    kernels.exponential_penalty(dt, t.detach(), 0.3)
    expected = start + torch.autograd.grad(0.3 * torch.exp(-t).sum(), t)[0]
    torch.testing.assert_close(dt, expected, rtol=1e-12, atol=1e-12)
    kernels.add_rows(start.unsqueeze(1), dt[:1])
    torch.testing.assert_close(dt[0], start.sum(), rtol=1e-12, atol=1e-12)
    assert kernels.known_finite(start)
    for value in (float("nan"), float("inf"), -float("inf")):
        start[size // 2] = value
        assert not kernels.known_finite(start)


@pytest.mark.parametrize("kernels", MODULES)
def test_derivative_of_the_magnitude_is_one_at_zero(kernels):
    dt = torch.tensor([2.0, 2.0, 2.0])
    kernels.through_abs(dt, torch.tensor([0.0, -0.0, -1.0]))
    assert dt.tolist() == [2, 2, -2]


@pytest.mark.parametrize("kernels", MODULES)
def test_variance_penalty_is_the_derivative_of_the_standard_deviation(kernels):
    G, M, H = (torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    M = (M > 0.5).double().requires_grad_()
    expected = -(torch.autograd.grad(0.7 * (G * M).std(), M)[0] * H).sum(1)
    kept = (G * M).detach()
    weighted, plain = (kept * G * H).sum(1), (G * H).sum(1)
    kernels.variance_penalty(weighted, plain, torch.stack([kept.sum(), kept.square().sum()]), 20, 0.7)
    torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=1e-12)
    for second in (0.0, float("nan"), float("inf")):  # no spread, or none that is known: no penalty
        weighted = torch.ones(3)
        kernels.variance_penalty(weighted, torch.zeros(3), torch.tensor([0.0, second]).double(), 6, 0.7)
        assert not weighted.any()


@pytest.mark.parametrize("kernels", MODULES)
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, low=st.floats(0, 1.0), width=st.floats(0.01, 1.0))
def test_magnitudes_within_bounds_are_found_and_those_above_counted(kernels, shape, seed, low, width):
    W, _, _ = draw(shape, seed)
    W[0, 0] = float("nan")
    above, magnitudes = kernels.near(W, low, low + width)
    assert above == int((~(W.abs() <= low + width)).sum())
    assert torch.equal(torch.from_numpy(magnitudes), W.abs()[(W.abs() > low) & (W.abs() <= low + width)])


def test_bounds_are_not_rounded_to_bfloat16():
    W = torch.tensor([[1.0, -1.0078125, 1.015625]], dtype=torch.bfloat16)  # neighbours
    above, magnitudes = thresholds_torch.near(W, 1.007, 1.008)
    assert (above, magnitudes.tolist()) == (1, [1.0078125])


@pytest.mark.parametrize("kernels", MODULES)
def test_no_magnitudes_are_found_where_there_are_no_rows(kernels):
    above, magnitudes = kernels.near(torch.empty(0, 3), 0.0, 1.0)
    assert (above, magnitudes.tolist()) == (0, [])


@pytest.mark.parametrize("kernels", MODULES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_rows_with_a_value_are_told_from_those_of_zeros(kernels, shape):
    P = torch.zeros(shape)
    if P.numel():
        P[0, 4], P[1, 0], P[2, 1] = 1e-45, -0.0, float("nan")
    expected = [bool(any(x != 0 for x in row)) for row in P.tolist()]
    for matrix in (P, P.t().contiguous().t()):
        empty, found = kernels.occupied(matrix)
        assert (empty, found.tolist()) == (expected.count(False), expected)
