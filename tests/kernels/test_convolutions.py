"""Compiled convolutions against dense ones: every way of reading, any batch, any chunk, any number of threads."""

import pytest
import torch
import wide_registers
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_fresh
from torch import nn
from torch.autograd import gradcheck

from lightning_sparse.kernels import convolutions_numba, plans
from lightning_sparse.kernels.geometry import Geometry
from lightning_sparse.kernels.structure import structure
from lightning_sparse.layers.functional import conv2d
from lightning_sparse.storage import SparseConv2d

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.fixture
def compiled(monkeypatch):
    """A function that forbids to unfold, and packs so many bytes at once, or more where a register has over 32."""

    def only(cached=plans._CACHED):
        forget()
        monkeypatch.setattr(plans, "_CACHED", cached * convolutions_numba._LINE // 32)
        monkeypatch.setattr(convolutions_numba, "unfolding", None)

    yield only
    forget()


def forget():
    plans.forward.cache_clear()
    plans.backward.cache_clear()


def parts(layer, x, delta):
    """Result, and gradients of input and weight: at the nonzeros."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weight = layer.values if isinstance(layer, SparseConv2d) else layer.weight
    return y, *torch.autograd.grad(y, (x, weight), delta)


def assert_dense(dense, x, delta=None, tolerance=1e-12):
    sparse = SparseConv2d.from_dense(dense)
    sparse.backend = "numba"
    delta = torch.randn_like(dense(x)) if delta is None else delta
    y, dx, dW = parts(dense, x, delta)
    expectations = y, dx, dW.reshape(-1)[sparse.positions]
    for ours, expected in zip(parts(sparse, x, delta), expectations, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() <= tolerance * expected.norm() + 1e-30


def thinned(density, *args, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(*args, bias=False, **options)
    layer.weight.data.mul_(torch.rand_like(layer.weight) < density)
    return layer


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kernel=pairs, stride=pairs, dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_every_way_of_reading_equals_the_dense_one(data, kernel, stride, dilation):
    groups, padding = data.draw(st.integers(1, 3)), data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    channels, filters = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    space = [max(data.draw(st.integers(1, 12)), r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    batch = data.draw(st.sampled_from([1, 2, 3, 4, 8, 11]))
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    layer = thinned(density, channels, filters, kernel, stride, padding, dilation, groups, dtype=dtype)
    order = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    x = torch.randn(batch, channels, *space, dtype=dtype).to(memory_format=order)
    delta = torch.randn_like(layer(x)).to(memory_format=order)
    assert_dense(layer, x, delta, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("cached", [1 << 14, 1 << 15, 1 << 20])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [8, 19])
def test_bands_and_groups_of_images_change_nothing(cached, stride, batch, compiled):
    compiled(cached)
    dtype = torch.float64
    for space in ((13, 10), (2, 2), (1, 1)):
        assert_dense(thinned(0.3, 6, 5, 3, stride, 1, dtype=dtype), torch.randn(batch, 6, *space, dtype=dtype))


@settings(max_examples=200, deadline=None)
@given(kernel=pairs, stride=pairs, padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), data=st.data())
def test_nothing_is_read_or_written_beside_what_is_packed(kernel, stride, padding, data):
    how = Geometry(kernel, stride, padding, data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2))))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, how.dilation, strict=True)]
    space = tuple(max(data.draw(st.integers(1, 40)), r - 2 * p) for r, p in zip(reach, padding, strict=True))
    channels, filters = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    strips = data.draw(st.sampled_from([1, 2, 8]))
    for make, read, made in (
        (plans.forward, channels, filters),
        (plans.backward, filters, channels),
    ):
        plan = make(how, space, channels, filters, 4, 8, strips)
        met = plan.taps != plans.NONE
        for phase in set(plan.phases.tolist()):
            taps, xat = plan.taps[phase][met[phase]], plan.xat[plan.phases == phase]
            if len(taps):
                assert xat.min() + taps.min() >= 0
                assert xat.max() + taps.max() + read * plan.lanes <= plan.sizes[0]
        assert plan.yat.min() >= 0
        assert plan.yat.max() + made * plan.lanes <= plan.sizes[1]


def test_each_filter_reads_its_own_channel(compiled):
    compiled()
    assert_dense(thinned(0.6, 32, 32, 3, 1, 1, groups=32, dtype=torch.float64), torch.randn(8, 32, 9, 9).double())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 20])
def test_threads_change_no_bit(stride, batch, compiled, monkeypatch):
    compiled(1 << 15)
    monkeypatch.setattr(convolutions_numba, "_SHARED_FROM", 1)
    layer = SparseConv2d.from_dense(thinned(0.3, 16, 24, 3, stride, 1))
    x, results = torch.randn(batch, 16, 15, 15), []
    delta = torch.randn(batch, 24, (15 - 1) // stride + 1, (15 - 1) // stride + 1)
    for threads in (1, 2, 5, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(parts(layer, x, delta))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_gradients_are_those_of_finite_differences(compiled):
    compiled()
    weight = structure(torch.tensor([0, 3, 4, 11, 17]), (2, 1, 3, 3))
    how = Geometry((3, 3), (2, 1), (1, 0), (1, 2))
    x, values = torch.randn(4, 1, 4, 6).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    assert gradcheck(lambda x, values: conv2d(x, values, None, weight._replace(backend="numba"), how), (x, values))


def test_low_precision_is_multiplied_in_float32(compiled, monkeypatch):
    compiled()
    monkeypatch.setattr(convolutions_numba, "_CONVERTED", 1)
    layer = thinned(0.4, 4, 6, 3, padding=1)
    sparse = SparseConv2d.from_dense(layer.bfloat16())
    x = torch.randn(11, 4, 5, 5).bfloat16()
    y, dx, dvalues = parts(sparse, x, torch.ones(11, 6, 5, 5).bfloat16())
    assert {y.dtype, dx.dtype, dvalues.dtype} == {torch.bfloat16}
    exact = parts(SparseConv2d.from_dense(layer.float()), x.float(), torch.ones(11, 6, 5, 5))
    for ours, theirs in zip((y, dx, dvalues), exact, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_images_of_few_positions_are_unfolded(monkeypatch):
    monkeypatch.setattr(convolutions_numba, "_multiply", None)
    monkeypatch.setattr(convolutions_numba, "_sample", None)
    assert_dense(thinned(0.4, 4, 6, 3, dtype=torch.float32), torch.randn(1, 4, 5, 5), tolerance=1e-5)


@pytest.mark.parametrize(("batch", "strips"), [(1, 8), (2, 4), (3, 2), (4, 1)])
def test_a_few_images_are_cut_into_strips_that_fill_a_register(batch, strips, compiled):
    compiled()
    csr, how = structure(torch.tensor([0]), (2, 4, 3, 3)).matrix, Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    plan = plans.usable(plans.forward, csr, torch.empty(batch, 4, 18, 20), how, itemsize=4, line=32)
    assert plan.strips.number == strips
    assert_dense(thinned(0.4, 4, 6, 3), torch.randn(batch, 4, 18, 20), tolerance=1e-5)


def test_what_takes_more_memory_packed_than_unfolded_is_unfolded(monkeypatch):
    monkeypatch.setattr(plans, "_CACHED", 1)
    forget()
    csr = structure(torch.tensor([0, 3]), (2, 2, 1, 1)).matrix
    how = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
    usable = [plans.usable(plans.forward, csr, torch.empty(8, 2, *space), how, 4, 32) for space in ((1, 50), (50, 1))]
    forget()
    assert usable[0] is None
    assert usable[1] is not None


@pytest.mark.skipif(convolutions_numba._LINE == 64, reason="all tests compute with registers of 64 bytes here")
def test_wider_registers_compute_the_same(tmp_path):
    found = run_fresh(wide_registers.differences, tmp_path)
    assert len(found) == 3
    assert max(found) < 1e-12
