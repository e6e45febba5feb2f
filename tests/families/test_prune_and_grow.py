"""Methods that move connections: small updates worked out by hand, and exact budgets everywhere."""

import warnings
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from helpers import NETS, Lit, Residual, StopsAfter, Watch, attached, cnn, data, fit, grid, loader, mlp, seeded, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DSR, GGR, ITOP, MEST, SET, SNFS, DeepR, GraNet, RigL
from lightning_sparse.accounting.ledger import mask_bits
from lightning_sparse.methods.ggr import ranking
from lightning_sparse.rules import select
from lightning_sparse.weights.base import MaskedWeight


def graded(module, gradients):
    for name, dP in gradients.items():
        module[name].grad = torch.tensor(dP)


# ---------------------------------------------------------------------- worked out by hand

W = {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.0, -0.4, 0.0]]}
DP = {"a": [[9.0, 9.0, -3.0, 1.0], [9.0, 2.0, 9.0, -4.0]]}


def test_rigl_drops_smallest_weights_and_grows_largest_gradients_among_the_others():
    module, _, weights = attached(RigL(0.5), W)
    graded(module, DP)
    weights[0].optimizer.state[module["a"]]["momentum_buffer"] = torch.ones(2, 4)
    RigL(0.5).update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(module["a"].data, torch.tensor([[0.5, 0, 0, 0], [0, 0, -0.4, 0]]))
    momentum = weights[0].optimizer.state[module["a"]]["momentum_buffer"]
    assert momentum.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]], "fresh for the dropped and the grown alone"


def test_set_drops_smallest_weights_and_grows_anywhere_else():
    found = set()
    for seed in range(30):
        callback = SET(0.5, seed=seed)
        _, _, weights = attached(callback, W)
        callback.update(weights, 0.25, 1.0)
        assert grid(weights[0])[1][0] == 0, "0.1 is the smallest"
        found.add(str(grid(weights[0])))
    assert found == {
        str(mask)
        for mask in (
            [[1, 1, 1, 0], [0, 0, 1, 0]],
            [[1, 1, 0, 1], [0, 0, 1, 0]],
            [[1, 1, 0, 0], [0, 1, 1, 0]],
            [[1, 1, 0, 0], [0, 0, 1, 1]],
        )
    }


TWO = {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.0, -0.4, 0.0]], "b": [[1.0, 0.3], [0.2, -0.1]]}


def test_snfs_averages_gradients_over_all_steps_without_their_scale():
    callback = SNFS(0.5, smoothing=0.75)
    module, _, weights = attached(callback, W)
    graded(module, {"a": [[32.0] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[1.0] * 4] * 2
    graded(module, {"a": [[0.0] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[0.75] * 4] * 2
    graded(module, {"a": [[float("inf")] * 4] * 2})
    callback.observe(weights, 8.0)
    assert weights[0].buffers["momentum"].tolist() == [[0.75] * 4] * 2, "AMP skips this step"


def test_snfs_shares_connections_in_proportion_to_the_mean_momentum():
    callback = SNFS(0.5)
    _, _, weights = attached(callback, {"a": TWO["a"], "b": [[1.0, 0.3, 0.0], [0.2, -0.1, 0.0]]})
    # mean |momentum| over active ones: a 0.5, b 1.5
    weights[0].buffers["momentum"] = torch.tensor([[0.5, 0.5, -2.0, 1.0], [0.5, 9.0, -0.5, 3.0]])
    weights[1].buffers["momentum"] = torch.tensor([[1.5, 1.5, 4.0], [-1.5, 1.5, -5.0]])
    # half of 4 and 4 goes; of the 4, a should have 1 and b 3, but b has room for 2: so a has 2
    callback.update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert grid(weights[1]) == [[1, 1, 1], [0, 0, 1]]


def test_snfs_takes_connections_from_a_dense_layer():
    callback = SNFS(0.5)
    _, _, weights = attached(callback, TWO)
    weights[0].buffers["momentum"] = torch.ones(2, 4)
    weights[1].buffers["momentum"] = torch.ones(2, 2)
    callback.update(weights, 0.25, 1.0)  # 1 of each; b has no free place but the one just left
    assert [weight.active for weight in weights] == [5, 3]


def test_dsr_drops_below_one_threshold_and_shares_by_survivors():
    callback = DSR(0.5, drop_fraction=0.5, init_threshold=0.25, stop_at=1.0, update_every=1)
    four = [[1.0, -0.3, 0.2, 0.3], [0.0] * 4]
    _, pool, weights = attached(callback, {"a": TWO["a"], "b": four})
    callback.fraction = lambda pool: 0.5
    callback.move(weights, pool, 1.0)
    # below 0.25: 2 of a, 1 of b: 3 where 4 was the target; survivors 2 and 3: of 3, 1.2 and 1.8
    assert [weight.active for weight in weights] == [3, 5]
    assert grid(weights[0])[0][:2] == [1, 0]
    assert grid(weights[0])[1][0] == 0
    assert grid(weights[1])[0] == [1, 1, 0, 1]
    assert pool.values == {"threshold": 0.5}
    assert callback.threshold == 0.5


def test_dsr_halves_its_threshold_when_too_many_were_dropped():
    callback = DSR(0.5, init_threshold=0.25)
    _, pool, weights = attached(callback, W)
    callback.fraction = lambda pool: 0.25
    callback.move(weights, pool, 1.0)
    assert pool.values == {"threshold": 0.125}


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
        assert b.active == 5
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
    assert weights[0].active == 8
    assert weights[0].mask.view(-1)[-4:].sum() == by_gradient


def test_mest_drops_by_magnitude_and_gradient_without_its_scale():
    callback = MEST(0.5, gradient_weight=0.5)
    module, _, weights = attached(callback, W)
    graded(module, {"a": [[0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]]})
    # |W| + 0.5 |dP| / 4 : 0.5 0.2 / 1.1 0.4
    callback.update(weights, 0.25, 4.0)
    assert weights[0].active == 4
    assert grid(weights[0])[0][:2] == [1, 0]
    assert [grid(weights[0])[1][i] for i in (0, 2)] == [1, 1]


def test_itop_remembers_what_has_been_active():
    callback = ITOP(0.5)
    module, _, weights = attached(callback, W)
    graded(module, DP)
    callback._explored.start(weights[0].name, weights[0].positions, 8)
    assert callback.exploration_rate == 0.5
    callback.update(weights, 0.5, 1.0)
    assert grid(weights[0]) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert callback.exploration_rate == 0.75
    assert ITOP(0.5, growth="random").skips_update is False
    with pytest.raises(RuntimeError, match="no weights yet"):
        _ = ITOP(0.5).exploration_rate


def test_granet_prunes_globally_then_regenerates_by_gradient(monkeypatch):
    callback = GraNet(0.5, initial_sparsity=0.0, drop_fraction=0.5, update_every=2)
    monkeypatch.setattr(GraNet, "total_steps", 8.0)
    module, pool, weights = attached(
        callback, {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.9, -0.4, 0.0]], "b": [[1.0, 0.3], [0.2, 0.0]]}
    )
    graded(module, {"a": [[0.0, 9.0, -3.0, 1.0], [9.0, 2.0, 9.0, -4.0]], "b": [[0.0, 0.0], [0.0, 1.0]]})
    pool.values["start"], pool.step = 8, 4  # the schedule ends: half of 12
    callback.move(weights, pool, 1.0)
    # 0.1 and 0.2 are pruned (of -0.2 and 0.2 the earlier stays); at half of the training the fraction is 0.25: in a 1
    # of 4 goes, -0.2, and -4 comes, 9 being pruned just now; in b none of 2
    assert callback.asked(pool) == 6
    assert grid(weights[0]) == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert grid(weights[1]) == [[1, 1], [0, 0]]
    pool.values["start"], pool.step = 6, 2  # nothing to prune, the fraction is 0.43
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 1, 0, 0], [0, 1, 1, 0]], "the new 0 goes, the first 9 comes"
    assert grid(weights[1]) == [[1, 1], [0, 0]]


def test_granet_does_not_grow_what_it_has_just_pruned(monkeypatch):
    callback = GraNet(0.5, initial_sparsity=0.0, drop_fraction=1.0, update_every=2)
    monkeypatch.setattr(GraNet, "total_steps", 8.0)
    module, pool, weights = attached(callback, {"a": [[4.0, 3.0, 2.0, 1.0]]})
    graded(module, {"a": [[0.0, 0.0, 0.0, 9.0]]})
    pool.step = 4
    callback.move(weights, pool, 1.0)
    assert grid(weights[0]) == [[1, 1, 0, 0]]


def test_deepr_moves_the_connections_whose_sign_has_changed():
    callback = DeepR(0.5, l1=0.0, temperature=0.0)
    module, _, weights = attached(callback, {"a": [[0.5, -0.2, 1.0, -1.0]]}, {"a": [[1, 1, 0, 0]]})
    optimizer = weights[0].optimizer
    module["a"].data = torch.tensor([[0.5, -0.2, 0.0, 0.0]])
    graded(module, {"a": [[1.2, 0.0, 9.0, 9.0]]})  # 0.5 becomes -0.1
    callback.before_step(optimizer, 1.0, 1.0)
    optimizer.step()
    callback.after_step(optimizer)
    assert weights[0].active == 2
    assert weights[0].mask[0, :2].tolist() == [False, True]
    new = int(weights[0].mask[0, 3]) + 2
    assert module["a"][0, new] == torch.tensor([1e-12, -1e-12])[new - 2], "small, and with the sign of its place"
    assert module["a"].data.count_nonzero() == 2


def test_deeprs_l1_term_shrinks_active_weights_by_lr_times_l1():
    callback = DeepR(0.5, l1=0.25, temperature=0.0)
    module, _, weights = attached(callback, {"a": [[0.5, -0.25, 1.0, -1.0]]}, {"a": [[1, 1, 0, 0]]})
    graded(module, {"a": [[0.0] * 4]})
    callback.before_step(weights[0].optimizer, 1.0, 1.0)
    weights[0].optimizer.step()
    callback.after_step(weights[0].optimizer)
    assert module["a"].tolist() == [[0.375, -0.125, 0.0, 0.0]]


def test_deeprs_noise_has_the_variance_of_its_temperature():
    callback = DeepR(0.5, l1=0.0, temperature=0.04)
    module, _, weights = attached(callback, {"a": [[100.0] * 100] * 100})
    graded(module, {"a": [[0.0] * 100] * 100})
    callback.before_step(weights[0].optimizer, 1.0, 1.0)
    weights[0].optimizer.step()
    callback.after_step(weights[0].optimizer)
    assert module["a"].detach().std() == pytest.approx((2 * 0.5 * 0.04) ** 0.5, rel=0.03)


def test_deepr_keeps_weights_that_no_step_has_updated():
    callback = DeepR(0.5, l1=0.25, temperature=1.0)
    module, _, weights = attached(callback, W)
    before = module["a"].data.clone()
    callback.before_step(weights[0].optimizer, 0.0, 1.0)
    callback.after_step(weights[0].optimizer)
    assert torch.equal(module["a"], before)


# ---------------------------------------------------------------------- the global count

scores_of_layers = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4)


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_are_those_of_one_over_all_layers(layers, draw):
    """With ties, and layer by layer; the earlier position wins."""
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.tensor(draw.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in scores]
    k = draw.draw(st.integers(0, sum(map(select.count, among))))
    whole = select.top_k(torch.cat(scores), k, among=torch.cat(among))
    expected = [int(part.sum()) for part in whole.split([len(s) for s in scores])]
    assert select.count_global_top_k(iter(scores), k, among) == expected


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_keep_what_each_layer_needs(layers, draw):
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.ones(len(s), dtype=torch.bool) for s in scores]
    least = [draw.draw(st.integers(0, len(s))) for s in scores]
    k = draw.draw(st.integers(sum(least), sum(map(len, scores))))
    sure = [select.top_k(s, n) for s, n in zip(scores, least, strict=True)]
    rest = select.top_k(torch.cat(scores), k - sum(least), among=~torch.cat(sure))
    expected = [n + int(p.sum()) for n, p in zip(least, rest.split([len(s) for s in scores]), strict=True)]
    assert select.count_global_top_k(scores, k, among, least) == expected


@given(st.lists(st.integers(-1, 4), max_size=40), st.data())
def test_the_largest_of_blocks_are_those_of_the_whole(scores, draw):
    """With ties, of which the earlier position wins, and marks of what is no candidate."""
    whole = torch.tensor(scores, dtype=torch.float32)
    edges = [0, *sorted(draw.draw(st.lists(st.integers(0, len(scores)), max_size=5))), len(scores)]
    blocks = [(a, whole[a:b]) for a, b in pairwise(edges)]
    above = draw.draw(st.sampled_from([-1.0, 0.0, 2.0]))
    candidates = whole > above
    k = draw.draw(st.integers(0, select.count(candidates)))
    expected = select.top_k(whole, k, among=candidates).nonzero().squeeze(1)
    for asked in {k, 50} if k == select.count(candidates) else {k}:
        positions, values = select.largest(blocks, asked, above)
        assert torch.equal(positions, expected)
        assert torch.equal(values, whole[expected])


@settings(deadline=None)
@given(scores_of_layers, st.data())
def test_ggrs_ranking_is_that_of_all_layers_together(layers, draw):
    weights = []
    for index, layer in enumerate(layers):
        mask = torch.tensor([draw.draw(st.lists(st.booleans(), min_size=len(layer), max_size=len(layer)))])
        weights.append(MaskedWeight(str(index), mask, parameter=nn.Parameter(torch.zeros(1, len(layer)))))
        weights[-1].parameter.grad = torch.tensor([layer], dtype=torch.float32)
    free, gradients = [~weight.mask for weight in weights], [weight.dP for weight in weights]
    least = [draw.draw(st.integers(0, weight.room)) for weight in weights]
    k = draw.draw(st.integers(sum(least), sum(weight.room for weight in weights)))
    counts = select.count_global_top_k(gradients, k, free, least)
    for (won, slopes), count, gradient, among in zip(ranking(weights, k, least), counts, gradients, free, strict=True):
        best = select.top_k(gradient, count, among).reshape(-1).nonzero().squeeze(1)
        assert torch.equal(won, best)
        assert torch.equal(slopes, gradient.reshape(-1)[best])


@settings(deadline=None)
@given(scores_of_layers, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_ggr_loses_nothing_and_keeps_min_layer_density_whatever_the_gradients(layers, floor, fraction, share, seed):
    callback = GGR(0.0, random_share=share, min_layer_density=floor, seed=seed)
    weights = {str(i): [[float(v) for v in layer]] for i, layer in enumerate(layers)}
    module, _, held = attached(callback, weights)
    graded(module, weights)
    for weight in held:  # begin with what the density asks for, and every second place
        count = max(callback.least(weight), weight.active // 2)
        weight.start(select.top_k_positions(torch.rand(weight.shape), count), callback.generator)
    before = [weight.mask for weight in held]
    callback.update(held, fraction, 1.0)
    assert sum(weight.active for weight in held) == sum(map(select.count, before))
    assert all(weight.active >= callback.least(weight) for weight in held)


def test_ggrs_random_share_is_uniform():
    callback = GGR(0.9, random_share=1.0, seed=5)
    hits = torch.zeros(20)
    active = torch.tensor([[i < 5 for i in range(20)]])
    module, _, (weight,) = attached(callback, {"a": active.float().tolist()})
    graded(module, {"a": [[1.0] * 20]})
    draws = 3000
    for _ in range(draws):
        weight.start(torch.arange(5), callback.generator)
        callback.update([weight], 0.6, 1.0)
        hits += (weight.mask & ~active)[0]
    assert hits[:5].sum() == 0
    expected = 3 * draws / 15
    assert ((hits[5:] - expected) ** 2 / expected).sum() < 29.1, "chi-square of 14 degrees, 1 %"


# ---------------------------------------------------------------------- exact budgets, on real networks


MOVERS = {
    "SET": lambda s, **kw: SET(s, update_every=3, **kw),
    "RigL": lambda s, **kw: RigL(s, update_every=3, stop_at=1.0, **kw),
    "ITOP": lambda s, **kw: ITOP(s, update_every=3, **kw),
    "MEST": lambda s, **kw: MEST(s, update_every=3, stop_at=1.0, **kw),
    "GGR": lambda s, **kw: GGR(s, 0.3, update_every=3, stop_at=1.0, **kw),
    "SNFS": lambda s, **kw: SNFS(s, update_every=3, **kw),
    "DSR": lambda s, **kw: DSR(s, init_threshold=0.1, update_every=3, stop_at=1.0, **kw),
    "DeepR": lambda s, **kw: DeepR(s, l1=0.01, **kw),
    "DeepR-global": lambda s, **kw: DeepR(s, l1=0.01, scope="global", **kw),
}
LOCAL = {"SET", "RigL", "ITOP", "MEST", "DeepR"}


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", MOVERS)
@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_the_budget_is_kept_exactly_after_every_step(method, net, sparsity):
    watch, _, _ = watched(MOVERS[method](sparsity), NETS[net])
    size = sum(mask.numel() for mask in watch.callback.masks.values())
    assert {sum(counts) for counts in watch.counts} == {size - round(sparsity * size)}
    if method in LOCAL:
        assert len({tuple(counts) for counts in watch.counts}) == 1
    if sparsity < 0.99:
        first, last = watch.masks[0], watch.masks[-1]
        assert any(not torch.equal(mask, last[name]) for name, mask in first.items())


@pytest.mark.parametrize("method", MOVERS)
def test_no_layer_falls_below_min_layer_density(method):
    watch, _, _ = watched(MOVERS[method](0.9, min_layer_density=0.09, distribution="uniform"), Residual)
    sizes = [mask.numel() for mask in watch.callback.masks.values()]
    assert all(n >= 0.09 * size for counts in watch.counts for n, size in zip(counts, sizes, strict=True))
    if method not in LOCAL:
        assert len({tuple(counts) for counts in watch.counts}) > 1, "connections have moved between layers"


@pytest.mark.parametrize("method", ["GGR", "SNFS", "DSR", "DeepR-global"])
def test_connections_move_between_layers(method):
    watch, _, _ = watched(MOVERS[method](0.8, distribution="uniform"), cnn)
    assert watch.counts[0] != watch.counts[-1]


def test_a_layer_that_lost_all_is_named_at_the_end_of_the_epoch():
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    module.net[2].weight.data.mul_(1e-6)  # below H from the first
    callback = DSR(0.8, init_threshold=1e-3, update_every=2, stop_at=1.0)
    with pytest.warns(UserWarning, match=r"net\.2\.weight has no weight left: density 0"):
        fit(callback, module, loader(32), max_epochs=1)
    assert callback.layer_density["net.2.weight"] == 0
    assert callback.density == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("method", sorted(MOVERS.keys() - {"DeepR", "DeepR-global"}))
def test_a_training_too_short_for_any_update_is_told(method):
    with pytest.warns(UserWarning, match=r"will move no connection: the training is too short"):
        watched(MOVERS[method](0.8), batches=3)


def test_ggr_updates_epoch_by_epoch_in_the_first_half_with_a_falling_fraction():
    class Fractions(GGR):
        def update(self, weights, fraction, scale):
            seen.append((self._epoch, self._pools[id(weights[0].optimizer)].step, fraction))
            super().update(weights, fraction, scale)

    seen = []
    fit(Fractions(0.8, drop_fraction=0.1), train=loader(40), max_epochs=8)
    assert [(epoch, step) for epoch, step, _ in seen] == [(1, 5), (2, 10), (3, 15)]
    assert [fraction for _, _, fraction in seen] == pytest.approx([0.1, 0.075, 0.025]), "0 at epoch 4 of 8"


def test_ties_are_settled_alike_in_every_run():
    class Level(Lit):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.net.parameters())  # all gradients are 1

    runs = []
    for _ in range(2):
        callback = GGR(0.8, 0.5, update_every=2, stop_at=1.0, seed=1)
        fit(callback, seeded(Level), loader(48), max_epochs=1)
        runs.append(callback.masks)
    assert all(torch.equal(mask, runs[1][name]) for name, mask in runs[0].items())


# ---------------------------------------------------------------------- ITOP, MEST, DeepR


def test_itop_keeps_no_positions_before_an_update():
    class Looks(pl.Callback):
        def on_train_start(self, run, module):
            assert all(weight._places is None for weight in callback._weights.values())
            looked.append(callback.exploration_rate)

    callback, looked = ITOP(0.75), []
    fit([callback, Looks()], max_steps=1)
    assert looked == [0.25]


def test_itop_explores_more_and_more_and_logs_it(tmp_path):
    logged = []

    class Rate(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.append(callback.exploration_rate)

    callback = ITOP(0.9, growth="random", update_every=5, decay="none")
    fit([callback, Rate()], train=loader(80), max_epochs=4)
    assert logged == sorted(logged)
    assert 0.1 < logged[0] < logged[-1] < 1
    assert callback.watched == {"sparsity/explored": callback.exploration_rate}
    ever = callback.state_dict()["explored"]["bits"]["net.0.weight"]
    assert (ever | ~mask_bits(callback.masks["net.0.weight"]) == 255).all()


@pytest.mark.parametrize(("update_every", "stop_at"), [(3, 1.0), (4, 0.75), (None, 0.5), (None, 1.0), (5, 0.6)])
def test_mests_soft_bound_has_more_between_updates_and_the_budget_at_the_end(update_every, stop_at):
    callback = MEST(0.9, soft_bound=True, update_every=update_every, stop_at=stop_at, decay="none")
    watch, _, _ = watched(callback, batches=7, max_epochs=4)
    totals = [sum(counts) for counts in watch.counts]
    K = 392 - round(0.9 * 392)
    assert totals[0] == totals[-1] == K
    more = sum(int(0.3 * n + 1e-6) for n in watch.counts[0])
    assert set(totals) == {K, K + more}
    assert watch.counts[0] == watch.counts[-1]


def test_mest_tells_of_a_training_that_ended_above_the_budget():
    callback = MEST(0.9, soft_bound=True, update_every=3)
    with pytest.warns(UserWarning, match=r"MEST has \d+ active weights above its budget"):
        fit([callback, StopsAfter()], train=loader(80), max_epochs=4)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_deepr_keeps_signs(scope):
    watch, module, _ = watched(DeepR(0.8, l1=0.01, temperature=1e-4, scope=scope), batches=40)
    start = {name: p.detach() > 0 for name, p in seeded(lambda: Lit(mlp())).named_parameters()}
    assert (len({tuple(counts) for counts in watch.counts}) == 1) is (scope == "layer")
    for name, mask in watch.callback.masks.items():
        W = module.get_parameter(name)
        assert torch.equal(W[mask] > 0, start[name][mask])
        assert torch.equal(W != 0, mask)
        assert not torch.equal(mask, watch.masks[0][name])


def test_deepr_rewires_a_dense_layer_in_place():
    """No other place is left, so the connection that flipped starts anew."""
    watch, module, _ = watched(DeepR(0.0, l1=0.05, temperature=1e-4), batches=20)
    assert {sum(counts) for counts in watch.counts} == {392}
    start = seeded(lambda: Lit(mlp())).get_parameter("net.0.weight") > 0
    assert torch.equal(module.net[0].weight > 0, start)


def test_a_weight_without_gradient_is_left_out_and_the_budget_kept():
    class Half(Lit):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).pow(2).mean() if batch_idx % 2 else super().training_step(batch, batch_idx)

    for name, build in MOVERS.items():
        callback = build(0.8)
        watch = Watch(callback)
        fit([callback, watch], seeded(Half), loader(96), max_epochs=1)
        assert {sum(counts) for counts in watch.counts} == {392 - round(0.8 * 392)}, name


# ---------------------------------------------------------------------- state and arguments


def test_dsrs_threshold_travels_with_the_checkpoint(tmp_path):
    callback, other = (DSR(0.8, init_threshold=1e-6, update_every=3, stop_at=1.0) for _ in range(2))
    _, _, run = watched(callback)
    assert callback.threshold == 1e-6 * 2**3
    run.save_checkpoint(tmp_path / "a.ckpt")
    seen = []

    class Read(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(other.threshold)

    x, y = data(96)
    train = DataLoader(TensorDataset(x, y), batch_size=8)
    again = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[other, Read()],
    )  # fmt: skip
    again.fit(Lit(), train, ckpt_path=tmp_path / "a.ckpt")
    assert seen == [callback.threshold]
    assert other.threshold > callback.threshold


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GGR(0.9, random_share=1.5), r"random_share must be a number from 0 to 1, got 1\.5"),
        (lambda: SNFS(0.9, smoothing=1.0), r"smoothing must be below 1, got 1\.0.*value is 0\.9"),
        (lambda: SNFS(0.9, smoothing=-1), r"smoothing must be a number from 0 to 1"),
        (lambda: DSR(0.9, init_threshold=0), r"init_threshold must be a finite number above 0, got 0.*value is 1e-3"),
        (lambda: DSR(0.9, init_threshold=-1), r"init_threshold must be a finite number above 0"),
        (lambda: DSR(0.9, tolerance=2), r"tolerance must be a number from 0 to 1, got 2"),
        (lambda: DSR(0.9, tolerance=1.0), r"tolerance must be below 1, got 1\.0"),
        (lambda: ITOP(0.9, growth="both"), r"growth must be one of \['gradient', 'random'\], got 'both'"),
        (lambda: MEST(0.9, gradient_weight=-0.5), r"gradient_weight must be a finite number of at least 0, got -0\.5"),
        (lambda: DeepR(0.9, l1=-1), r"l1 must be a finite number of at least 0, got -1"),
        (lambda: DeepR(0.9, temperature=float("nan")), r"temperature must be a finite number of at least 0, got nan"),
        (lambda: DeepR(0.9, scope="pool"), r"scope must be one of \['global', 'layer'\], got 'pool'"),
        (lambda: SET(0.9, drop_fraction=0), r"drop_fraction must be above 0, got 0.*RandomPruning"),
        (lambda: RigL(0.9, update_every=0), r"update_every must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_nothing_is_told_of_a_training_long_enough():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(will move|has no weight left|above its budget)")
        for build in MOVERS.values():
            watched(build(0.5))
