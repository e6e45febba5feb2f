"""Connections in a checkpoint are taken up as they are, or refused before a weight is made of them."""

import pytest
import torch
from altered import alterations, is_positions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparse.storage import SparseConv2d, SparseLinear, make_sparse_
from lightning_sparse.storage.checkpoint import make_state_sparse

POSITIONS = torch.tensor([0, 3, 7, 8, 29])


def weight():
    return torch.zeros(30).index_fill(0, POSITIONS, 2.0).view(5, 6)


@settings(max_examples=100, deadline=None)
@given(alterations(), st.sampled_from(["of a checkpoint", "of a new layer", "of a layer"]))
def test_positions_are_in_the_weight_or_refused(alter, whose):
    positions = alter(POSITIONS)
    layer, state = nn.Linear(6, 5), {"a.weight": weight(), "b": torch.ones(2)}
    sparse = SparseLinear(6, 5, nnz=5)
    before = sparse.state_dict()["col"].clone()
    good = is_positions(positions, 30)
    whole = good and set(POSITIONS.tolist()) <= set(positions.tolist())
    make = {
        "of a checkpoint": lambda: make_state_sparse(state, "a", sparse, positions),
        "of a new layer": lambda: make_sparse_(layer, positions),
        "of a layer": lambda: sparse.set_connections(positions, torch.ones(len(positions) if good else 1)),
    }[whose]
    if whole or (good and whose != "of a checkpoint"):
        make()
        assert whose != "of a checkpoint" or len(state["a.values"]) == len(positions)
        return
    with pytest.raises(ValueError, match=r"must be (a vector|ascending|from 0 to 29|0 outside)"):
        make()
    assert state.keys() == {"a.weight", "b"}
    assert type(layer) is nn.Linear
    assert torch.equal(sparse.col, before)


def test_a_layer_takes_one_value_for_each_position():
    layer = SparseConv2d(4, 6, 3, nnz=20, groups=2)
    with pytest.raises(ValueError, match=r"values must have one element for each of 2 positions, got \(3,\)\. Give w"):
        layer.set_connections(torch.tensor([1, 5]), torch.ones(3))
