"""Freed memory is given back when there is enough of it."""

import pytest

from lightning_sparse.compat import heap


@pytest.fixture
def trims(monkeypatch):
    """The process has 100 bytes, and had as many the last time."""
    calls = []
    monkeypatch.setattr(heap, "_trim", calls.append)
    monkeypatch.setattr(heap, "_resident", lambda: 100)
    monkeypatch.setattr(heap, "_resident_then", 100)
    return calls


@pytest.mark.parametrize(
    ("now", "spare", "trimmed"), [(100, 0, True), (149, 50, False), (150, 50, True), (90, 50, True), (90, 0, True)]
)
def test_a_process_that_has_grown_by_less_than_what_it_may_is_left_alone(trims, monkeypatch, now, spare, trimmed):
    monkeypatch.setattr(heap, "_resident", lambda: now)
    heap.trim_heap(spare)
    assert len(trims) == trimmed
    assert heap._resident_then == (now if trimmed else 100), "growth is counted from the last time"


def test_nothing_is_done_where_the_library_cannot(monkeypatch):
    monkeypatch.setattr(heap, "_trim", None)
    heap.trim_heap()
    heap.trim_heap(1)
