"""SRigL: an update worked out by hand, updates by a naive reference, whole fan-ins, ablation."""

import pytest
import torch
from by_hand import graded
from helpers import Lit, attached, cnn, fit, fits, grid, loader, mlp, same, seeded, watched
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse import SRigL
from lightning_sparse.rules.budgets import budget
from lightning_sparse.rules.fan_in import FanIn, whole_fan_ins
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix

W = {
    "a": [
        [0.9, 0.8, 0.0, 0.0, 0.0, 0.0],
        [0.1, 0.0, 0.7, 0.0, 0.0, 0.0],
        [0.0, 0.2, 0.3, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.6, 0.4, 0.0],
    ]
}
# the largest of connections that are not there: 9, 8, 7 and 6
DP = {
    "a": [
        [0.0, 0.0, 9.0, -1.0, 2.0, 3.0],
        [9.9, -8.0, 0.0, 0.5, 0.4, 0.3],
        [0.1, 9.9, 9.9, 0.2, -0.25, 0.15],
        [7.0, 6.0, 0.6, 9.9, 9.9, 0.7],
    ]
}

# ---------------------------------------------------------------------- an update


def updated(min_salient):
    """The layer after an update that drops half of its eight connections: 0.1, 0.2, 0.3 and 0.4."""
    callback = SRigL(0.66, min_salient=min_salient)
    module, _, (weight,) = attached(callback, W)
    graded(module, DP)
    callback.update([weight], 0.5, 1.0)
    return weight


def test_a_neuron_without_salient_connections_goes_and_the_others_have_three_in_place_of_two():
    weight = updated(0.5)
    assert grid(weight) == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]]
    kept = torch.zeros(4, 6)
    for place, value in {(0, 0): 0.9, (0, 1): 0.8, (1, 2): 0.7, (3, 3): 0.6}.items():
        kept[place] = value
    assert torch.equal(weight.W, kept)


def test_without_ablation_each_neuron_grows_what_it_lost():
    assert grid(updated(0.0)) == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]]


def reference(W, mask, dP, share, gamma, n):
    """The mask after an update of matrices whose entries are all different, one neuron after the other."""
    rows, columns = W.shape
    there = [r for r in range(rows) if mask[r].any()]
    active = [(r, c) for r in there for c in range(columns) if mask[r, c]]
    others = [(r, c) for r in there for c in range(columns) if not mask[r, c]]
    K = min(int(share * len(active)), len(others))
    D = sorted(active, key=lambda at: abs(W[at]))[:K]
    G = sorted(others, key=lambda at: -abs(dP[at]))[:K]
    salient = {r: sum(at[0] == r for at in active) - sum(at[0] == r for at in D) + sum(at[0] == r for at in G)
               for r in there}  # fmt: skip
    k = len(active) // len(there)
    weak = sorted((r for r in there if salient[r] < gamma * k), key=lambda r: salient[r])
    while weak and (len(there) - 1) * columns >= n:
        there.remove(weak.pop(0))
    k, after = max(1, int(n / len(there) + 0.5)), torch.zeros_like(mask)
    for r in there:
        staying = [at for at in active if at[0] == r and at not in D]
        growing = sorted((at for at in others if at[0] == r), key=lambda at: -abs(dP[at]))
        lost = sorted((at for at in D if at[0] == r), key=lambda at: -abs(W[at]))
        for at in [*staying, *growing[: k - len(staying)], *lost][:k]:
            after[at] = True
    return after


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "outputs", "k"), [((9, 8), FIRST, 2), ((7, 3, 2, 2), FIRST, 8), ((8, 9), Outputs(1), 4)]
)
def test_updates_are_those_of_a_naive_reference(shape, outputs, k, gamma):
    generator = torch.Generator().manual_seed(k)
    start = torch.zeros(shape)
    start.view(-1)[FanIn().draw(k * outputs.rows(shape), shape, generator, None, outputs)] = 1
    callback = SRigL(0.5, min_salient=gamma)
    module, _, (weight,) = attached(callback, {"a": start.tolist()})
    weight.outputs, n = outputs, int(start.sum())
    for _ in range(4):
        W, dP = (torch.randn(shape, generator=generator) for _ in range(2))
        module["a"].data.copy_(W * weight.mask)
        module["a"].grad = dP.clone()
        ours, theirs, gradients = (as_matrix(x, outputs) for x in (weight.W.clone(), weight.mask, dP))
        expected = reference(ours, theirs, gradients, 0.4, gamma, n)
        callback.update([weight], 0.4, 1.0)
        assert torch.equal(as_matrix(weight.mask, outputs), expected)
        assert torch.equal(weight.W != 0, weight.mask & (W != 0) & (weight.W == W))
    if gamma in (0, 1):
        assert bool(callback.ablated["a"]) == bool(gamma)


# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize("net", [mlp, cnn])
def test_fan_ins_are_constant_after_every_step_and_whole_ones_near_the_budget(net, caplog):
    callback = SRigL(0.6, min_salient=0.95, update_every=3, drop_fraction=0.5)
    with caplog.at_level("INFO"):
        watch, _, _ = watched(callback, net, batches=12)
    assert watch.moves > 1
    weights, pattern = callback._weights, FanIn()
    for masks in watch.masks:
        assert all(pattern.fits(mask, weights[name].outputs) for name, mask in masks.items())
    first = sum(watch.counts[0])
    assert f"has {first} connections for a budget of {budget(0.6, callback.size)}. A neuron has " in caplog.text
    rows = {name: len(mask) for name, mask in callback.masks.items()}
    assert 2 * abs(first - budget(0.6, callback.size)) <= max(rows.values())
    for (name, mask), began in zip(callback.masks.items(), watch.counts[0], strict=True):
        left = rows[name] - callback.ablated[name]
        assert int(mask.any(-1).view(len(mask), -1).any(1).sum()) == left
        assert 2 * abs(int(mask.sum()) - began) <= left
    assert sum(callback.ablated.values()) == callback.extra_metrics["sparsity/ablated"] > 0, "it would prove nothing"


def test_a_second_fit_of_sparse_layers_goes_on_without_the_neurons_that_are_gone():
    callback = SRigL(0.7, min_salient=0.9, update_every=3, drop_fraction=0.5, storage="sparse")
    module, _ = fit(callback, train=loader(96), max_epochs=1)
    assert sum(callback.ablated.values()) > 0, "the test would prove nothing"
    masks = callback.masks
    fit(callback, module, loader(8), max_epochs=1)
    assert same(masks, callback.masks)


def test_a_fit_goes_on_where_whole_fan_ins_of_the_start_and_after_ablation_add_up():
    # 16 of 120: at the start 2 for each of 10 neurons; when 8 are left, 3 for each
    module = seeded(lambda: Lit(nn.Linear(12, 10)))
    module.net.weight.data[8:], module.net.weight.data[:, 3:] = 0, 0
    callback = SRigL(0.87, initial="zeros")
    fit(callback, module, loader(8), max_epochs=1)
    assert callback.layer_count == {"net.weight": 24}
    assert callback.surplus == 8


@pytest.mark.parametrize(
    ("initial", "sparsity", "floor", "first"),
    [
        ("random", 0.78, 0.17, [48, 30, 8]),  # 32.6 of 16 neurons, 27.2 of 10 and 6.8 of 4, rounded up: the budget
        ("magnitude", 0.8, 0.16, [32, 30, 16]),  # 32 of 192 are above 0.16, but 30, of 6 neurons, are not
        ("global_magnitude", 0.8, 0.15, [32, 30, 12]),
    ],
)
def test_min_layer_density_is_held_by_whole_fan_ins_at_the_start_and_after_ablation(initial, sparsity, floor, first):
    options = {"min_salient": 0.95, "update_every": 3, "drop_fraction": 0.5}
    callback = SRigL(sparsity, initial=initial, min_layer_density=floor, **options)
    watch, module, _ = watched(callback, mlp, batches=12)
    assert watch.counts[0] == first
    assert sum(callback.ablated.values()) > 0, "the test would prove nothing"
    for counts in watch.counts:
        assert all(n >= floor * mask.numel() for n, mask in zip(counts, callback.masks.values(), strict=True))
    fit(callback, module, loader(8), max_epochs=1)


def test_neurons_that_are_divided_by_their_norms_stay():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 4))
    callback = SRigL(0.7, min_salient=1.0, update_every=2, drop_fraction=0.9)
    module = seeded(lambda: Lit(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.01)))
    fit(callback, module, loader(96), max_epochs=1)
    normalised, plain = callback.ablated.values()
    assert normalised == 0 < plain


# ---------------------------------------------------------------------- the first connections


def test_fan_ins_are_shares_rounded_up_or_down_and_their_sum_is_near_the_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        neurons = torch.randint(1, 60, (5,), generator=generator).tolist()
        shares = [n + int(torch.randint(300, (), generator=generator)) for n in neurons]
        found = whole_fan_ins(shares, neurons)
        assert all(abs(k - share / n) < 1 for k, share, n in zip(found, shares, neurons, strict=True))
        off = sum(k * n - share for k, share, n in zip(found, shares, neurons, strict=True))
        assert 2 * abs(off) <= max(neurons)


def test_random_inputs_are_even_draws():
    counts, generator = torch.zeros(6, 10), torch.Generator().manual_seed(0)
    for _ in range(200):
        mask = torch.zeros(60)
        mask[FanIn().draw(18, (6, 10), generator)] = 1
        counts += mask.view(6, 10)
    assert (counts.sum(1) == 600).all()
    assert fits(counts, torch.full((6, 10), 60.0))


@pytest.mark.parametrize("initial", ["magnitude", "global_magnitude"])
def test_starts_keep_the_largest_of_each_neuron(initial):
    module = seeded(lambda: Lit(nn.Linear(12, 4), optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    magnitudes = module.net.weight.detach().abs()
    callback = SRigL(0.75, initial=initial)
    with pytest.warns(UserWarning, match="will move no connection"):
        fit(callback, module, loader(8), max_epochs=1)
    assert torch.equal(callback.masks["net.weight"], magnitudes.argsort(1).argsort(1) >= 9)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"a whole fan-in of each neuron, takes 30 weights, the budget is 8. Lower"):
        fit(SRigL(0.98), max_epochs=1)
    with pytest.raises(ValueError, match=r"a whole fan-in of each neuron, takes 96 weights.*or min_layer_density"):
        fit(SRigL(0.8, min_layer_density=0.19), max_epochs=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pattern'"):
        SRigL(0.5, pattern="2:4")
    with pytest.raises(ValueError, match=r"min_salient must be a number from 0 to 1, got 1\.5\. 0\.3 is usual"):
        SRigL(0.5, min_salient=1.5)
    module = seeded(lambda: Lit(nn.Linear(12, 4)))
    module.net.weight.data[0, 0] = 0
    with pytest.raises(Exception, match=r"must have weights of pattern='fan-in', but those .* in net.weight are not"):
        fit(SRigL(None, initial="zeros"), module, loader(8), max_epochs=1)
    module.net.weight.data[:, ::3] = 0
    with pytest.raises(Exception, match=r"have 32 connections, sparsity=0.5 asks for 24"):
        fit(SRigL(0.5, initial="zeros"), module, loader(8), max_epochs=1)
    module.net.weight.data[2], callback = 0, SRigL(None, initial="zeros")
    fit(callback, module, loader(8), max_epochs=1)
    assert callback.layer_count == {"net.weight": 24}
    assert callback.ablated == {"net.weight": 1}
