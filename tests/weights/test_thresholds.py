"""Thresholds of several weights, laid end to end."""

import pytest
import torch

from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.weights.thresholds import WeightThresholds, buffers


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
def test_the_first_threshold_of_each_weight_is_read(granularity):
    starts = {3: -1.5, 1: 0.25, 2: 2.0}
    laid = [WeightThresholds.new(torch.empty(out, 4), FIRST, granularity, {"t": t}) for out, t in starts.items()]
    (buffer,) = buffers(laid)
    assert buffer.firsts() == [-1.5, 0.25, 2.0]


@pytest.mark.parametrize(("rows", "firsts"), [((2, 0, 1, 0), [0.5, 0.0, 0.5, 0.0]), ((0, 0), [0.0, 0.0])])
def test_a_weight_without_rows_here_has_no_threshold_to_read(rows, firsts):
    (buffer,) = buffers([WeightThresholds.new(torch.empty(n, 4), FIRST, "neuron", {"t": 0.5}) for n in rows])
    assert buffer.firsts() == firsts
