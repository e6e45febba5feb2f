"""Sampling and the gradients of samples: exact counts, the distributions asked for, autograd's values."""

import math

import pytest
import torch
from helpers import Largest, fits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparse.kernels import geometry as reading
from lightning_sparse.kernels.structure import csr
from lightning_sparse.layers import functional
from lightning_sparse.rules import drawn, sampling


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- endpoint distributions


def test_unit_sums_add_magnitudes_over_all_but_the_units():
    x = torch.tensor([[[1.0, -2.0, 0.0], [3.0, 1.0, -1.0]], [[0.0, 5.0, -1.0], [-2.0, 2.0, 0.0]]])
    assert sampling.unit_sums(x, -1).tolist() == [6, 10, 2]
    assert sampling.unit_sums(x, 1).tolist() == [9, 9]
    assert sampling.unit_sums(x[0, 0], -1).tolist() == [1, 2, 0]
    many = torch.full((2000, 1), 100.0, dtype=torch.float16)  # 200000 is more than half precision holds
    assert sampling.unit_sums(many, 1).tolist() == [200000]


@pytest.mark.parametrize("broken", [[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]])
def test_probabilities_are_proportional_and_uniform_where_there_is_nothing_to_go_by(broken):
    assert sampling.probabilities(torch.tensor([3.0, 1.0, 0.0])).tolist() == [0.75, 0.25, 0]
    assert sampling.probabilities(torch.tensor([1e308, 1e308], dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert sampling.probabilities(torch.tensor(broken)).tolist() == [0.5, 0.5]


# ---------------------------------------------------------------------- sampling


SHAPES = [((4, 6), 1), ((6, 2, 3), 3), ((4, 3, 2, 2), 2), ((4, 1, 3), 4), ((1, 1), 1)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**20), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.data())
def test_a_subset_has_exactly_n_different_free_positions(layer, seed, density, share, uniform, draw):
    shape, groups = layer
    generator, size = seeded(seed), math.prod(shape)
    taken = torch.rand(size, generator=generator).lt(density).nonzero().squeeze(1)
    n = int(share * (size - len(taken)))
    ends = {}
    if not uniform:  # also with zeros, in number from none to all
        inputs, zeros = shape[1] * groups, draw.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        f, g = (
            torch.rand(k, generator=generator) * torch.rand(k, generator=generator).ge(zeros)
            for k in (inputs, shape[0])
        )
        ends = {"f": sampling.probabilities(f), "g": sampling.probabilities(g), "groups": groups}
    subset = sampling.subset(n, taken, shape, generator, **ends)
    assert len(subset) == n
    assert (subset[1:] > subset[:-1]).all()
    assert not n or (subset[0] >= 0 and subset[-1] < size)
    assert not torch.isin(subset, taken).any()


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:4])
def test_draws_follow_f_times_g_with_the_place_in_the_kernel_uniform(shape, groups):
    inputs, n = shape[1] * groups, 40000
    f = sampling.probabilities(torch.arange(1.0, inputs + 1))
    g = sampling.probabilities(torch.arange(float(shape[0]), 0, -1))
    g[0] = 0
    drawn = sampling.Endpoints(shape, f, g, groups).draw(n, seeded())
    # each output beside the inputs of its own group, then every place in the kernel
    read = f.view(groups, 1, -1).expand(groups, shape[0] // groups, -1).reshape(shape[0], -1)
    joint = (g.unsqueeze(1) * read).flatten().repeat_interleave(math.prod(shape[2:]))
    assert fits(torch.bincount(drawn, minlength=math.prod(shape)), n * joint / joint.sum())


def test_the_first_one_drawn_follows_f_times_g_among_the_free():
    f, g = torch.tensor([0.1, 0.2, 0.7]).double(), torch.tensor([0.6, 0.4]).double()
    taken, generator = torch.tensor([1, 2]), seeded()
    counts = torch.zeros(6)
    for _ in range(1500):
        counts[sampling.subset(1, taken, (2, 3), generator, f, g)] += 1
    free = torch.outer(g, f).flatten()
    free[taken] = 0
    assert fits(counts, 1500 * free / free.sum())


@pytest.fixture(params=["more than are missing", "just as many", "in lists"])
def way(request, monkeypatch):
    """The ways of drawing: weights that are small take the first, and lists where few are drawn from many."""
    monkeypatch.setattr(sampling, "_FEW", 1 << 14 if request.param == "more than are missing" else 0)
    monkeypatch.setattr(drawn, "_MARKED", 0 if request.param == "in lists" else 32)


@pytest.mark.usefixtures("way")
def test_pairs_are_as_likely_as_when_drawn_one_after_the_other():
    f, g = torch.tensor([0.2, 0.8]).double(), torch.tensor([0.3, 0.7]).double()
    p, generator = torch.outer(g, f).flatten(), seeded()
    counts, expected = torch.zeros(4, 4), torch.zeros(4, 4)
    for _ in range(1000):
        i, j = sampling.subset(2, torch.empty(0, dtype=torch.long), (2, 2), generator, f, g).tolist()
        counts[i, j] += 1
    for i in range(4):
        for j in range(i + 1, 4):
            expected[i, j] = 1000 * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))
    assert fits(counts, expected)


def test_marks_and_lists_find_the_same(monkeypatch):
    f, g = (sampling.probabilities(torch.rand(k, generator=seeded(k)) ** 4) for k in (300, 200))
    taken = sampling.distinct(6000, 60000, seeded())
    marked = sampling.subset(30000, taken, (200, 300), seeded(1), f, g)
    monkeypatch.setattr(drawn, "_MARKED", 0)
    assert torch.equal(sampling.subset(30000, taken, (200, 300), seeded(1), f, g), marked)
    assert len(marked) == 30000
    assert not torch.isin(marked, taken).any()


@pytest.mark.parametrize("n", [7, 5000])  # drawn one by one, and nearly all at once
def test_counts_are_those_of_as_many_draws(n):
    lengths = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7]).double()
    intervals, generator, total = sampling._Intervals(lengths), seeded(), torch.zeros(5)
    for _ in range(100):
        counts = intervals.counts(n, generator)
        assert int(counts.sum()) == n
        total += counts
    assert fits(total, 100 * n * lengths)


def test_intervals_are_found_as_by_a_search():
    lengths = sampling.probabilities(torch.rand(500, generator=seeded()).ge(0.3) * torch.rand(500, generator=seeded(1)))
    found = sampling._Intervals(lengths).draw(torch.tensor([0, 10**5]), torch.tensor([0]), 500, seeded(2))
    u = torch.rand(10**5, generator=seeded(2), dtype=torch.float64) * lengths.cumsum(0)[-1]
    assert torch.equal(found, torch.searchsorted(lengths.cumsum(0), u, right=True).clamp(max=499))


@pytest.mark.parametrize("n", [3, 10])  # of 16 free positions: numbers are drawn, or all permuted
def test_without_endpoints_all_free_positions_are_equally_likely(n):
    taken, generator, counts = torch.tensor([0, 5, 6, 19]), seeded(), torch.zeros(20)
    for _ in range(2000):
        counts[sampling.subset(n, taken, (4, 5), generator)] += 1
    expected = torch.full((20,), 2000 * n / 16)
    expected[taken] = 0
    assert fits(counts, expected)


def test_units_without_probability_come_last_and_then_all_alike(monkeypatch):
    monkeypatch.setattr(sampling, "_ROUNDS", 4)
    f, g = torch.tensor([0.0, 1, 0, 0]).double(), torch.tensor([0.5, 0.5, 0]).double()
    taken, generator, counts = torch.tensor([1]), seeded(), torch.zeros(12)
    for _ in range(75):
        subset = sampling.subset(3, taken, (3, 4), generator, f, g)
        assert 5 in subset  # the only free one with a probability above 0
        counts[subset] += 1
    counts[5] -= 75
    expected = torch.full((12,), 75 * 2 / 10)
    expected[[1, 5]] = 0
    assert fits(counts, expected)
    # two groups: outputs of the first alone have probability, and inputs of the second alone
    apart = sampling.subset(
        2, taken, (2, 2), generator, torch.tensor([0, 0, 0.5, 0.5]).double(), torch.eye(2)[0].double(), 2
    )
    assert len(apart) == 2


def test_more_than_is_free_is_refused():
    with pytest.raises(ValueError, match="5 connections were asked for, 4 are free"):
        sampling.subset(5, torch.tensor([0, 3]), (2, 3), seeded())


@pytest.mark.parametrize("uniform", [True, False])
def test_memory_does_not_grow_with_the_size_of_the_weight(uniform):
    """A weight of 10^12 elements, of which 2000 are active: nothing of its size can ever be made."""
    side, generator = 10**6, seeded()
    taken = sampling.distinct(2000, side**2, generator)
    ends = {} if uniform else dict.fromkeys("fg", torch.full((side,), 1 / side, dtype=torch.float64))
    subset = sampling.subset(5000, taken, (side, side), generator, **ends)
    assert len(torch.unique(subset)) == 5000
    assert subset[-1] > 0.9 * side**2
    assert not torch.isin(subset, taken).any()


# ---------------------------------------------------------------------- gradients of some connections


def run(layer, x):
    """Return the layer's input, the gradient of its output and the dense gradient of its weight."""
    y = layer(x)
    loss = (y**3).sum()
    delta, dense = torch.autograd.grad(loss, [y, layer.weight])
    return x, delta, dense.flatten()


def some(size):
    return sampling.distinct(max(1, size // 3), size, seeded(1))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 3, 4), ()])
def test_linear_subset_gradient_is_the_dense_one_there(leading, backend):
    torch.manual_seed(0)
    h, delta, dense = run(nn.Linear(6, 4).double(), torch.randn(*leading, 6, dtype=torch.float64))
    positions = some(24)
    gradient = functional.linear_gradient(h, delta, csr(positions, (4, 6)), backend)
    assert torch.allclose(gradient, dense[positions], rtol=0, atol=1e-10)


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": "valid", "stride": (2, 3)},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1), "groups": 2},
    {"kernel_size": (2, 4), "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (0, 1), "padding_mode": "replicate", "groups": 4},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
]


def of_convolution(options):
    """Return the layer, its dense gradient and what its sparse form computes gradients from: input, output's, how."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **options).double()
    h, delta, dense = run(layer, torch.randn(3, 4, 9, 8, dtype=torch.float64))
    x, geometry = functional.padded(layer, h)
    return layer, dense, x, delta, geometry


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_subset_gradient_is_the_dense_one_there(options, chunk, backend, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    layer, dense, x, delta, geometry = of_convolution(options)
    for positions in (some(len(dense)), torch.arange(len(dense))):
        where = csr(positions, layer.weight.shape, layer.groups)
        gradient = functional.conv2d_gradient(x, delta, where, geometry, backend)
        assert torch.allclose(gradient, dense[positions], rtol=0, atol=1e-10)


@pytest.mark.parametrize("leading", [(5,), (2, 5), ()])
def test_gradient_of_rows_of_a_linear_layer_is_the_dense_one_there(leading):
    torch.manual_seed(0)
    h, delta, dense = run(nn.Linear(6, 4).double(), torch.randn(*leading, 6, dtype=torch.float64))
    for rows in (slice(0, 4), slice(1, 3), slice(3, 4)):
        gradient = functional.linear_gradient_rows(h, delta, rows)
        assert torch.allclose(gradient, dense.view(4, 6)[rows], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_gradient_of_filters_is_the_dense_one_there(options, chunk, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    layer, dense, x, delta, geometry = of_convolution(options)
    for rows in (slice(0, 8), slice(1, 6), slice(7, 8)):
        gradient = functional.conv2d_gradient_rows(x, delta, rows, layer.weight.shape, geometry, layer.groups)
        assert torch.allclose(gradient, dense.view(layer.weight.shape)[rows], rtol=0, atol=1e-10)


def test_no_tensor_beyond_the_chunk_is_made(monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 400)
    h, delta, positions = torch.randn(8, 100), torch.randn(8, 200), sampling.distinct(600, 20000, seeded())
    x, delta2 = torch.randn(9, 10, 4, 4), torch.randn(9, 20, 2, 2)
    geometry = functional.Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    with Largest() as largest:
        functional.linear_gradient(h, delta, csr(positions, (200, 100)))
        functional.conv2d_gradient(x, delta2, csr(positions[:30], (20, 10, 3, 3)), geometry)
    assert largest.size <= 1600  # the input and its gradient themselves, of which views are taken
