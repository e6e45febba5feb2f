"""Kernels of all weights at once compute what torch's compute one weight at a time."""

import pytest
import torch

from lightning_sparse.kernels import bits, thresholds_torch

fused = pytest.importorskip("lightning_sparse.kernels.thresholds_fused", exc_type=ImportError)

SHAPES = [(5, 7), (3, 40), (1, 1), (6, 300)]

#: of weights and thresholds, and how far sums of rows, which are added up in another order, may be apart; the scalar
#: ``alpha`` is a float32 in a kernel
KINDS = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 1e-2),
]
pytestmark = [
    pytest.mark.parametrize(("dtype", "exact", "tolerance"), KINDS),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, for tensors of a GPU"),
]


def flat(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def draw(dtype, exact, per_row):
    generator = torch.Generator().manual_seed(0)
    W = [(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7).to(dtype) for shape in SHAPES]
    dP = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    tau = [torch.rand(out if per_row else 1, 1, generator=generator, dtype=exact) for out, _ in SHAPES]
    return fused.Rows.of_shapes(SHAPES, per_row, torch.device("cpu")), W, dP, tau


def rows_like(tensors, exact):
    return [torch.empty(len(x), 1, dtype=exact) for x in tensors]


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, flat(theirs), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("per_row", [True, False])
def test_projections(per_row, dtype, exact, tolerance):
    rows, W, _, tau = draw(dtype, exact, per_row)
    W[1][0, 0] = float("nan")
    out, theirs = torch.empty(sum(x.numel() for x in W), dtype=dtype), [torch.empty_like(x) for x in W]
    passing = rows.hard_project(flat(W), flat(tau), out)
    for w, t, x in zip(W, tau, theirs, strict=True):
        thresholds_torch.hard_project(w, t.expand(len(w), 1), x)
    assert torch.equal(out.nan_to_num(7), flat(theirs).nan_to_num(7))
    assert passing.tolist() == [int((x != 0).sum()) for x in theirs]
    for shrinkage in (1.0, 0.25):
        rows.soft_project(flat(W), flat(tau), out, shrinkage)
        for w, t, x in zip(W, tau, theirs, strict=True):
            thresholds_torch.soft_project(w, t.expand(len(w), 1), x, shrinkage)
        close(out, theirs, tolerance)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.375, 1.0])
def test_gradients(alpha, per_row, dtype, exact, tolerance):
    rows, W, dP, tau = draw(dtype, exact, per_row)
    sums, theirs = torch.empty(sum(len(x) for x in W), dtype=exact), rows_like(W, exact)
    ours, name, more = (
        flat(dP),
        "hard_gradient" if alpha is None else "soft_gradient",
        () if alpha is None else (alpha,),
    )
    getattr(rows, name)(ours, flat(W), flat(tau), sums, *more)
    for g, w, t, x in zip(dP, W, tau, theirs, strict=True):
        getattr(thresholds_torch, name)(g, w, t.expand(len(w), 1), x, *more)
    close(ours, dP, tolerance)
    close(sums, theirs, tolerance)


@pytest.mark.parametrize("per_row", [True, False])
def test_backward_masks(per_row, dtype, exact, tolerance):
    rows, _, dP, tau = draw(dtype, exact, per_row)
    dP[3][2] = 0
    packed = [torch.empty_like(bits.pack(g)) for g in dP]
    weighted, plain, moments = rows_like(dP, exact), rows_like(dP, exact), torch.zeros(2, dtype=torch.float64)
    ours, masks, sums = flat(dP), torch.empty_like(flat(packed)), torch.zeros(2, dtype=torch.float64)
    a, b = torch.empty_like(flat(weighted)), torch.empty_like(flat(plain))
    rows.backward_mask(ours, flat(tau) / 8, masks, a, b, sums)
    for g, t, m, x, y in zip(dP, tau, packed, weighted, plain, strict=True):
        thresholds_torch.backward_mask(g, t.expand(len(g), 1) / 8, m, x, y, moments)
    assert torch.equal(masks, flat(packed))
    assert torch.equal(ours, flat(dP))
    close(a, weighted, tolerance)
    close(b, plain, tolerance)
    torch.testing.assert_close(sums, moments, rtol=tolerance, atol=tolerance)


def test_vectors(dtype, exact, tolerance):
    generator = torch.Generator().manual_seed(0)
    t, dt = (torch.randn(1500, dtype=exact, generator=generator) for _ in range(2))
    t[3] = 0
    for name, more in (("through_abs", ()), ("through_sigmoid", ()), ("exponential_penalty", (0.375,))):
        ours, theirs = dt.clone(), dt.clone()
        getattr(fused, name)(ours, t, *more)
        getattr(thresholds_torch, name)(theirs, t, *more)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for second in (90.0, 0.0, float("inf"), float("nan")):
        moments = torch.tensor([3.0, second], dtype=torch.float64)
        ours, theirs = dt.clone(), dt.clone()
        fused.variance_penalty(ours, t.clone(), moments, 100, 0.5)
        thresholds_torch.variance_penalty(theirs, t.clone(), moments, 100, 0.5)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not fused.known_finite(t)
