import pytest
import torch

from lightning_sparse.rules.runs import Runs

SHAPE = (4, 6, 2)
SHARDS = {
    "rows": [(range(3), range(6), range(2)), (range(3, 4), range(6), range(2))],
    "columns": [(range(4), range(2), range(2)), (range(4), range(2, 6), range(2))],
    "both": [(range(a, a + 2), range(b, b + 3), range(2)) for a in (0, 2) for b in (0, 3)],
}


@pytest.mark.parametrize("kind", SHARDS)
def test_runs_are_the_positions_of_the_elements_of_each_shard(kind):
    shards = SHARDS[kind]
    divided = {d for d, n in enumerate(SHAPE) if any(len(ranges[d]) < n for ranges in shards)}
    all_positions = torch.arange(4 * 6 * 2).view(SHAPE)
    numbers = []
    for ranges in shards:
        runs = Runs(SHAPE, ranges, divided, shards)
        here = all_positions[tuple(slice(r.start, r.stop) for r in ranges)].reshape(-1)
        indices = torch.arange(len(here))
        assert torch.equal(runs.positions(indices), here)
        assert torch.equal(runs.indices(here), indices)
        assert torch.equal(all_positions.view(-1)[runs.has(all_positions.view(-1))], here)
        run, counts = runs.counts(here)
        assert counts.tolist() == [runs.length] * len(runs)
        assert torch.equal(run, indices // runs.length)
        numbers += runs.numbers.tolist()
    assert sorted(numbers) == list(range(runs.total))
