"""The same number of connections for each row."""

import pytest
import torch

from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix
from lightning_sparse.rules.rows import counts_of_rows, top_k_of_rows


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_differ_by_one_at_most_and_add_up(rows):
    for k in range(5 * rows):
        counts = counts_of_rows(k, rows)
        assert int(counts.sum()) == k
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("shape", "outputs"), [((5, 7), FIRST), ((6, 2, 3, 3), FIRST), ((7, 5), Outputs(1)), ((4, 6, 3), Outputs(1, 2))]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_row_keeps_its_largest(shape, outputs, channels_last):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last and len(shape) == 4:
        scores = scores.contiguous(memory_format=torch.channels_last)
    k = scores.numel() // 3
    mask = top_k_of_rows(scores, k, outputs)
    assert mask.shape == scores.shape
    rows, chosen = as_matrix(scores, outputs), as_matrix(mask, outputs)
    for row, kept, n in zip(rows, chosen, counts_of_rows(k, len(rows)), strict=True):
        assert sorted(row[kept].tolist()) == sorted(row.tolist())[-int(n) :]


def test_equals_are_spread_over_the_columns():
    mask = top_k_of_rows(torch.ones(12, 12), 36)
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == [3] * 12
