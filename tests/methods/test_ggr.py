"""GGR: its ranking against that of all layers together, its random share, and an update by hand."""

import pytest
import torch
from by_hand import TWO, graded
from helpers import attached, fit, grid, loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparse import GGR
from lightning_sparse.rules import budgets, select, ties
from lightning_sparse.rules.ranking import ranking
from lightning_sparse.weights.masked import MaskedWeight

# ---------------------------------------------------------------------- worked out by hand


def test_ggr_counts_winners_of_all_layers_and_fills_each_by_gradient_and_at_random():
    weights = {"a": TWO["a"], "b": [[1.0, 0.3, 0.2], [-0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]}
    gradients = {
        "a": [[9.0, 9.0, -1.0, 1.0], [9.0, 2.0, 9.0, 5.0]],
        "b": [[9.0] * 3, [9.0, 6.0, -7.0], [3.0, 0.0, 4.0]],
    }
    for seed in range(10):
        callback = GGR(0.5, seed=seed)
        module, _, (a, b) = attached(callback, weights)
        graded(module, gradients)
        # half of 4 and 4 goes; the 4 largest of the free: 7 6 5 4: 1 in a, 3 in b
        callback.update([a, b], 0.5, 1.0)
        assert grid(a) == [[1, 0, 0, 0], [0, 0, 1, 1]], "the only one of a goes by gradient"
        assert b.num_active == 5
        assert grid(b)[0] == [1, 1, 0]
        assert grid(b)[1] == [0, 1, 1], "2 of 3 by gradient, the third anywhere"
        assert a.W[1, 3] == b.W[1, 1] == torch.tensor(1e-10)


@pytest.mark.parametrize(("share", "by_gradient"), [(0.0, 4), (0.25, 3), (0.5, 2), (1.0, 0)])
def test_ggrs_ablations_grow_all_by_gradient_or_at_random(share, by_gradient):
    first = torch.zeros(40, 10)
    first[0, :8] = torch.arange(1, 9)
    callback = GGR(0.9, random_share=share, seed=3)
    module, _, weights = attached(callback, {"a": first.tolist()})
    graded(module, {"a": torch.arange(400.0).view(40, 10).tolist()})
    callback.update(weights, 0.5, 1.0)
    assert weights[0].num_active == 8
    assert weights[0].mask.view(-1)[-4:].sum() == by_gradient


scores_of_layers = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4)

# ---------------------------------------------------------------------- the global count


@settings(deadline=None)
@given(scores_of_layers, st.data())
def test_ggrs_ranking_is_that_of_all_layers_together(layers, draw):
    weights = []
    for index, layer in enumerate(layers):
        mask = torch.tensor([draw.draw(st.lists(st.booleans(), min_size=len(layer), max_size=len(layer)))])
        weights.append(MaskedWeight(str(index), mask, parameter=nn.Parameter(torch.zeros(1, len(layer)))))
        weights[-1].parameter.grad = torch.tensor([layer], dtype=torch.float32)
    least = [draw.draw(st.integers(0, weight.num_inactive)) for weight in weights]
    k = draw.draw(st.integers(sum(least), sum(weight.num_inactive for weight in weights)))
    candidates, expected = [], []
    for owner, (weight, sure) in enumerate(zip(weights, least, strict=True)):
        rank = ties.spread(torch.arange(weight.size), weight.shape)
        free = (~weight.mask).reshape(-1).nonzero().squeeze(1).tolist()
        free.sort(key=lambda p, dP=weight.dP[0], rank=rank: (-float(dP[p]), int(rank[p])))
        expected.append(free[:sure])
        candidates += [(-float(weight.dP[0, p]), int(rank[p]) / weight.size, owner, p) for p in free[sure:]]
    for *_, owner, p in sorted(candidates)[: k - sum(least)]:
        expected[owner].append(p)
    for (won, slopes), best, weight in zip(ranking(weights, k, least), expected, weights, strict=True):
        assert won.tolist() == sorted(best)
        assert torch.equal(slopes, weight.dP[0, won])


@settings(deadline=None)
@given(scores_of_layers, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_ggr_loses_nothing_and_keeps_min_layer_density_whatever_the_gradients(layers, floor, fraction, share, seed):
    callback = GGR(0.0, random_share=share, min_layer_density=floor, seed=seed)
    weights = {str(i): [[float(v) for v in layer]] for i, layer in enumerate(layers)}
    module, _, held = attached(callback, weights)
    graded(module, weights)
    for weight in held:  # begin with what the density asks for, and every second place
        count = max(budgets.least(floor, weight.size), weight.num_active // 2)
        weight.start(select.top_k_positions(torch.rand(weight.shape), count), callback.generator)
    before = [weight.mask for weight in held]
    callback.update(held, fraction, 1.0)
    assert sum(weight.num_active for weight in held) == sum(map(select.count, before))
    assert all(weight.num_active >= budgets.least(floor, weight.size) for weight in held)


def test_ggrs_random_share_is_uniform():
    callback = GGR(0.9, random_share=1.0, seed=5)
    hits = torch.zeros(20)
    active = torch.tensor([[i < 5 for i in range(20)]])
    module, _, (weight,) = attached(callback, {"a": active.float().tolist()})
    graded(module, {"a": [[1.0] * 20]})
    draws = 1000
    for _ in range(draws):
        weight.start(torch.arange(5), callback.generator)
        callback.update([weight], 0.6, 1.0)
        hits += (weight.mask & ~active)[0]
    assert hits[:5].sum() == 0
    expected = 3 * draws / 15
    assert ((hits[5:] - expected) ** 2 / expected).sum() < 29.1, "chi-square of 14 degrees, 1 %"


# ---------------------------------------------------------------------- exact budgets, on real networks


def test_ggr_updates_epoch_by_epoch_in_the_first_half_with_a_falling_fraction():
    class Fractions(GGR):
        def update(self, weights, fraction, scale):
            seen.append((self._epoch, self._groups.of(weights[0].optimizer).step, fraction))
            super().update(weights, fraction, scale)

    seen = []
    fit(Fractions(0.8, drop_fraction=0.1, update_every=None), train=loader(40), max_epochs=8)
    assert [(epoch, step) for epoch, step, _ in seen] == [(1, 5), (2, 10), (3, 15)]
    assert [fraction for _, _, fraction in seen] == pytest.approx([0.1, 0.075, 0.025]), "0 at epoch 4 of 8"
