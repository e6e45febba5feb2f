"""The exchange of dense layers for truly sparse ones."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse import SET
from lightning_sparse.layers.sparse import SparseConv2d, SparseLinear
from lightning_sparse.storage.exchange import exchange_layers, prefix


def trainer():
    return SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda x: x))


def exchanged(module, **options):
    return exchange_layers(SET(0.5, storage="sparse", seed=1, **options).store, trainer(), module)


def test_chosen_layers_become_sparse_with_as_many_connections_as_the_budget_has():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 8))
    weights = exchanged(net)
    assert [weight.name for weight in weights] == ["0.weight", "2.weight"]
    assert [type(layer) for layer in (net[0], net[2])] == [SparseConv2d, SparseLinear]
    assert sum(weight.num_active for weight in weights) == (2 * 4 * 9 + 4 * 8) // 2


def test_what_is_left_out_stays_dense():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    (weight,) = exchanged(net, exclude=["1.*"])
    assert weight.name == "0.weight"
    assert type(net[1]) is nn.Linear


class Mine(nn.Linear):
    """Another class, which may compute something else."""


def test_layers_of_other_types_are_refused_by_name():
    net = nn.Sequential(nn.Linear(6, 8), Mine(8, 4))
    with pytest.raises(MisconfigurationException, match=r"plain nn\.Linear and nn\.Conv2d layers only, not 1\.weight"):
        exchanged(net)
    assert type(net[0]) is nn.Linear, "nothing has been exchanged"


def test_layers_that_are_sparse_already_keep_their_connections():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    store = SET(0.5, storage="sparse", seed=1).store
    first = exchange_layers(store, trainer(), net)
    store.method._weights = {weight.name: weight for weight in first}
    before = [weight.active_indices.clone() for weight in first]
    again = exchange_layers(store, trainer(), net)
    assert [weight.sparse for weight in again] == [net[0], net[1]]
    assert all(torch.equal(weight.active_indices, x) for weight, x in zip(again, before, strict=True))


def test_the_name_of_a_layer_comes_of_its_weight():
    assert (prefix("net.0.weight"), prefix("weight")) == ("net.0", "")
