"""Ascending positions: each form of each function does what plain Python does."""

import importlib
import itertools
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
@given(st.integers(0, 6), st.integers(1, 7), st.data(), DTYPES)
def test_columns_move_row_by_row_as_flat_positions_do(code, rows, columns, data, dtype):
    places = st.sets(st.integers(0, rows * columns - 1)) if rows else st.just(set())
    held = data.draw(places)
    dropped = data.draw(st.sets(st.sampled_from(sorted(held)))) if held else set()
    grown = data.draw(places) - (held - dropped)  # also some that are dropped

    def by_row(flat):
        counts = [sum(x // columns == row for x in flat) for row in range(rows)]
        crow = torch.tensor([0, *itertools.accumulate(counts)], dtype=dtype)
        return crow, torch.tensor([x % columns for x in sorted(flat)], dtype=dtype)

    col, source = code.exchanged(by_row(held), by_row(dropped), by_row(grown), columns)
    whole = [ascending(x, dtype) for x in (held, dropped, grown)]
    positions, expected = code.moved(*whole)
    assert torch.equal(source, expected)
    assert torch.equal(col, positions % columns)
    assert (col.dtype, source.dtype) == (dtype, torch.int32)


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_places_among_what_is_not_held_are_positions(code, held, places):
    held, places = ascending(held), ascending(places)
    others = [x for x in range(200) if x not in held.tolist()]
    assert code.unheld(held, places).tolist() == [others[place] for place in places.tolist()]


@settings(deadline=None)
@given(
    st.integers(0, 40),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([0.0, 1.0, 1.5, 4.0]),
    st.data(),
)
@pytest.mark.parametrize("piece", [8, 1 << 12])
def test_magnitudes_reach_a_bound_where_nothing_is_marked(code, piece, size, dtype, bound, data):
    number = st.integers(-3, 3) | st.sampled_from([math.nan, math.inf, -math.inf])
    x = data.draw(st.lists(number, min_size=size, max_size=size))
    first = data.draw(st.sampled_from([0, 100, 2**32]))
    marked = data.draw(st.sets(st.integers(0, size - 1))) if size else set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sparse.kernels.positions_numba._PIECE", piece, raising=False)
        vector, places = torch.tensor(x, dtype=dtype), ascending(first + i for i in marked)
        found, magnitudes = code.unmarked(vector, places, first, bound)
    expected = [i for i in range(size) if i not in marked and not abs(x[i]) < bound]
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    assert torch.equal(
        magnitudes.nan_to_num(7.0), torch.tensor([x[i] for i in expected], dtype=dtype).abs().nan_to_num(7.0)
    )


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
    """Also in those of no length; rows of them lie in some intervals alone."""
    generator = torch.Generator().manual_seed(n)
    lengths = torch.rand(n, generator=generator, dtype=torch.float64).mul_(torch.arange(n) % 3)
    drawn = sampling._Intervals(lengths / max(1.0, float(lengths.sum())))
    u = torch.rand(500, generator=generator, dtype=torch.float64) * drawn._ends[-1]
    rows, low, width = torch.tensor([0, 200, 200, 500]), torch.tensor([0, n // 2, n // 3]), -(-n // 2)
    found = code.located(u, drawn._ends, drawn._first, rows, low, width)
    searched = torch.searchsorted(drawn._ends, u, right=True)
    expected = [
        searched[first:last].clamp(a, a + width - 1)
        for a, first, last in zip(low.tolist(), rows[:-1], rows[1:], strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))


@settings(deadline=None)
@given(NUMBERS, NUMBERS, DTYPES)
def test_vectors_without_common_elements_are_merged(code, a, b, dtype):
    b = set(b) - set(a)
    found = code.merged(ascending(a, dtype), ascending(b, dtype))
    assert found.tolist() == sorted({*a, *b})
    assert found.dtype == dtype


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=70), st.integers(0, 600))
def test_marks_are_listed_and_set(code, marks, zeros):
    """Also few among many, and beginning where no word does."""
    vector = torch.tensor([False, *marks, *[False] * zeros])[1:]
    expected = [i for i, mark in enumerate(marks) if mark]
    assert code.marked(vector).tolist() == expected
    assert code.marked(vector).dtype == torch.int64


@settings(deadline=None)
@given(NUMBERS, st.lists(st.integers(0, 60), max_size=40))
def test_marking_counts_what_was_not_marked(code, before, positions):
    marks = torch.zeros(61, dtype=torch.bool)
    marks[torch.tensor(before, dtype=torch.long)] = True
    assert code.mark_(marks, torch.tensor(positions, dtype=torch.long)) == len(set(positions) - set(before))
    assert marks.nonzero().flatten().tolist() == sorted({*before, *positions})


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
