"""Parts of weights: the positions that each process holds. How they choose together is tested in test_shards.py."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from lightning_sparse.rules import shard as shards_of
from lightning_sparse.rules.parts import Shard


@pytest.fixture(
    params=[
        ((7, 3), [range(4), range(4, 7), range(0)], [range(3)]),  # rows, of which one process has none
        ((4, 7), [range(4)], [range(4), range(4, 7)]),  # columns
        ((5, 4), [range(3), range(3, 5)], [range(2), range(2, 4)]),  # both
        ((3, 4, 2), [range(2), range(2, 3)], [range(1), range(1, 4)]),
        ((2, 3), [range(2)], [range(3)]),  # all, on two processes
    ],
    ids=["rows", "columns", "both", "three dimensions", "replicas"],
)
def shards(request, monkeypatch):
    """The shards of a weight, one for each process."""
    shape, rows, columns = request.param
    held = [(*ranges, *map(range, shape[2:])) for ranges in product(rows, columns)]
    held *= 1 + (len(held) == 1)
    monkeypatch.setattr(Shard, "_held", lambda shard: held)
    made = []
    for rank, ranges in enumerate(held):
        monkeypatch.setattr(shards_of.distributed, "get_rank", lambda rank=rank: rank)
        made.append(Shard(SimpleNamespace(shape=shape, ranges=ranges), torch.device("cpu")))
    return made


def test_positions_are_those_of_the_whole_weight(shards):
    for shard in shards:
        everywhere = torch.arange(math.prod(shard.shape))
        expected = shard.cut(everywhere.view(shard.shape)).flatten()
        assert shard.shape_here(shard.shape) == shard.cut(everywhere.view(shard.shape)).shape
        assert torch.equal(shard.positions(torch.arange(len(expected))), expected)
        assert torch.equal(shard.here(everywhere), expected)
        assert torch.equal(shard.indices(expected), torch.arange(len(expected)))
        assert shard.length(len(everywhere)) == len(expected)


def test_each_position_has_one_owner(shards):
    owned = [shard.positions(torch.arange(shard.length(0))) for shard in shards if shard.is_owner]
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(math.prod(shards[0].shape)))


def test_a_copy_without_processes_cannot_be_joined(shards):
    shard = Shard.__new__(Shard)
    shard.__dict__.update(shards[0].__getstate__())
    with pytest.raises(RuntimeError, match="no processes that hold the other parts"):
        shard.joined(torch.zeros(1))
