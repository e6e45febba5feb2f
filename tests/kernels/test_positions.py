"""Ascending positions: each form of each function does what plain Python does."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sparse.kernels import positions
from lightning_sparse.rules import sampling


@pytest.fixture(params=["torch", "numba"], scope="module")
def code(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    return importlib.import_module(f"lightning_sparse.kernels.positions_{request.param}")


def ascending(numbers, dtype=torch.int64):
    return torch.tensor(sorted(set(numbers)), dtype=dtype)


NUMBERS = st.lists(st.integers(0, 60), max_size=40)
DTYPES = st.sampled_from([torch.int32, torch.int64])


@settings(deadline=None)
@given(NUMBERS, NUMBERS, DTYPES, st.booleans())
def test_ranks_count_the_lesser_ones(code, a, b, dtype, right):
    a, b = ascending(a, dtype), ascending(b, dtype)
    expected = [sum(x <= y if right else x < y for x in a.tolist()) for y in b.tolist()]
    assert code.ranks(a, b, right).tolist() == expected


@settings(deadline=None)
@given(NUMBERS, NUMBERS, st.data(), DTYPES)
def test_moved_positions_know_where_they_come_from(code, held, others, data, dtype):
    held = ascending(held, dtype)
    dropped = ascending(
        data.draw(st.lists(st.sampled_from(held.tolist()), max_size=20) if len(held) else st.just([])), dtype
    )
    staying = set(held.tolist()) - set(dropped.tolist())
    grown = ascending(set(others) - staying, dtype)  # also some that are dropped
    found, source = code.moved(held, dropped, grown)
    assert found.tolist() == sorted(staying | set(grown.tolist()))
    assert found.dtype == dtype
    assert torch.cat((held, grown))[source].tolist() == found.tolist()
    grown_again = source >= len(held)
    assert found[grown_again].tolist() == grown.tolist()


@settings(deadline=None)
@given(
    st.integers(0, 20), st.integers(0, 20), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.data()
)
def test_elements_are_taken_from_two_vectors(code, a, b, dtype, data):
    indices = data.draw(st.lists(st.integers(0, a + b - 1), max_size=30) if a + b else st.just([]))
    x, new = torch.arange(a).to(dtype), torch.arange(a, a + b).to(dtype)
    assert code.taken(x, new, torch.tensor(indices, dtype=torch.int32)).tolist() == indices


@settings(deadline=None)
@given(
    st.lists(st.integers(-3, 3) | st.sampled_from([math.nan, math.inf, -math.inf])), st.integers(-3, 3), st.booleans()
)
def test_what_reaches_a_bound_is_not_beyond_it_and_neither_is_what_is_no_number(code, x, bound, largest):
    expected = [i for i, value in enumerate(x) if not (value < bound if largest else value > bound)]
    assert code.reached(torch.tensor(x, dtype=torch.float32), float(bound), largest).tolist() == expected


@pytest.mark.parametrize("n", [1, 5, 100])
def test_numbers_lie_in_the_intervals_that_a_search_finds(code, n):
    """Also in those of no length."""
    generator = torch.Generator().manual_seed(n)
    lengths = torch.rand(n, generator=generator, dtype=torch.float64).mul_(torch.arange(n) % 3)
    drawn = sampling._Intervals(lengths / max(1.0, float(lengths.sum())))
    u = torch.rand(500, generator=generator, dtype=torch.float64) * drawn._ends[-1]
    assert torch.equal(code.intervals(u, drawn._ends, drawn._only), torch.searchsorted(drawn._ends, u, right=True))


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, 1), st.integers(0, 999), st.sampled_from([1, 4, 1 << 17]))
def test_rows_are_shifted_and_the_transpose_is_that_of_the_dense_matrix(code, rows, columns, density, seed, chunk):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    where = mask.flatten().nonzero().squeeze(1)
    crow = torch.cat((torch.zeros(1), mask.sum(1).cumsum(0))).int()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sparse.kernels.positions_torch._CHUNK", chunk)
        col = code.shifted(crow, where, -columns * torch.arange(rows), torch.int32)
        crow_of, col_of, permutation = code.transposed(crow, col, columns)
    assert torch.equal(col, (where % columns).int())
    assert torch.equal(crow_of, torch.cat((torch.zeros(1), mask.sum(0).cumsum(0))).int())
    assert torch.equal(col_of, mask.t().nonzero()[:, 1].int())
    assert torch.equal(where[permutation], mask.t().nonzero() @ torch.tensor([1, columns]))


@pytest.mark.parametrize("size", [100, 1 << 16])  # few and many
def test_any_size_has_the_same_answer(size):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randperm(4 * size, generator=generator)[:size].sort().values for _ in range(2))
    assert torch.equal(positions.ranks(a, b), torch.searchsorted(a, b))
    assert torch.equal(positions.ranks(a, b[:3], right=True), torch.searchsorted(a, b[:3], right=True))
