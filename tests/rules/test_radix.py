"""Choosing by counts of bits, as processes do together: here all numbers are of one."""

import pytest
import torch

from lightning_sparse.rules.radix import kth, least, ordered


def alone(counts):
    return counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ordered_keeps_the_order(dtype):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys = ordered(torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=dtype)]))
    assert torch.equal(keys[:500].sort().indices, x.double().sort().indices) or torch.equal(
        x[keys[:500].sort().indices], x.sort().values
    )
    assert keys[500] == keys[501]
    assert keys[502] == keys.max()
    assert keys[503] == keys.min()


def test_no_number_counts_as_infinitely_large():
    assert ordered(torch.tensor([torch.nan, torch.inf])).unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_least_are_those_of_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(1)
    for length, values, k in ((40, 5, 13), (300, 1 << 30, 299), (64, 2, 31), (7, 9, 0), (5, 1, 5)):
        keys = torch.randint(-values, values, (length,), generator=generator, dtype=dtype)
        expected = torch.zeros(length, dtype=torch.bool)
        expected[keys.sort(stable=True).indices[:k]] = True
        (found,) = least([keys], [k], [[lambda indices: indices]], alone)
        assert torch.equal(found, expected)


def test_lists_are_counted_together_and_orders_come_one_after_the_other():
    rounds = []

    def counted(counts):
        rounds.append(len(counts))
        return counts

    keys = [torch.tensor([1, 1, 1, 0]), torch.tensor([2, 2])]
    orders = [[lambda i: torch.tensor([1, 0, 0, 0])[i], lambda i: -i], [lambda i: i]]
    assert [marks.tolist() for marks in least(keys, [2, 2], orders, counted)] == [
        [False, False, True, True],
        [True, True],
    ]
    assert rounds[0] == 2


def test_too_many_are_refused():
    with pytest.raises(ValueError, match="3 of 2 candidates"):
        kth([torch.tensor([1, 2])], [3], alone)
