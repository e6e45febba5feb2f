"""Weights as matrices, wherever the outputs lie."""

import pytest
import torch

from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, outputs_first, rows_of, write_matrix

WEIGHTS = [  # shape, where the outputs lie, number of outputs
    ((6, 4), FIRST, 6),
    ((6, 4, 3), FIRST, 6),
    ((6, 2, 3, 3), FIRST, 6),
    ((6, 2, 1, 2, 2), FIRST, 6),
    ((4, 3, 2, 2), Outputs(1), 3),
    ((4, 3, 2, 2), Outputs(1, 2), 6),
    ((4, 6), Outputs(1), 6),
    ((3, 2, 5), Outputs(2), 5),
    ((3, 4, 6), Outputs(1, 3, True), 12),
    ((3, 4, 6), Outputs(2, 3, True), 18),
]


@pytest.mark.parametrize(("shape", "outputs", "count"), WEIGHTS)
def test_as_matrix_and_write_matrix_undo_one_another(shape, outputs, count):
    torch.manual_seed(0)
    for x in (torch.randn(shape), torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)):
        matrix = as_matrix(x, outputs)
        assert len(matrix) == count == outputs.rows(shape)
        result = torch.empty_like(x)
        view = as_matrix(result, outputs)
        view.copy_(matrix)
        write_matrix(result, view, outputs)
        assert torch.equal(result, x)


@pytest.mark.parametrize(("shape", "outputs", "count"), WEIGHTS)
def test_rows_of_are_those_of_the_matrix(shape, outputs, count):
    positions = torch.arange(torch.Size(shape).numel())
    rows = rows_of(positions, shape, outputs)
    matrix = as_matrix(rows.view(shape), outputs)
    assert torch.equal(matrix, torch.arange(count)[:, None].expand_as(matrix))
    assert len(outputs_first(rows.view(shape), outputs)) == count


def test_a_stack_is_its_matrices_one_below_the_other():
    x = torch.randn(3, 4, 6)
    assert torch.equal(as_matrix(x, Outputs(1, 3, True)), torch.cat([*x]))
    assert torch.equal(as_matrix(x, Outputs(2, 3, True)), torch.cat([part.T for part in x]))


def test_outputs_of_checkpoints_of_earlier_versions_are_known():
    assert Outputs.of_state({"transposed_groups": 0}) == FIRST
    assert Outputs.of_state({"transposed_groups": 2}) == Outputs(1, 2)
    assert Outputs.of_state({"outputs": {"axis": 2, "groups": 3, "stacked": True}}) == Outputs(2, 3, True)
