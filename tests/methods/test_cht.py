"""CHT: updates worked out by hand, draws in proportion, and weights that are no graphs."""

import pytest
import torch
from helpers import Lit, attached, cnn, fit, fits, grid, loader, seeded, watched
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse import CHT
from lightning_sparse.methods import cht
from lightning_sparse.rules import criteria, sampling
from lightning_sparse.rules.budgets import budget
from lightning_sparse.rules.link_prediction import PREDICTORS, ch2_l3n, ch3_l3p

# 7 links; the likeliest of those that are missing is in row 2, column 1, on two paths: 1 - output 0 - input 0 - 2, with
# two links of output 0 to others, and 1 - output 1 - input 0 - 2, with none: 1 / sqrt(3) + 1
GRAPH = [[5.0, 4.0, 3.0, 2.0], [6.0, 7.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]]
LINKS = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def updated(row, column, **options):
    """The weight after an update of the graph, and of a link of 0.1 more, which is the smallest."""
    callback, matrix = CHT(0.5, **options), [[*values] for values in GRAPH]
    matrix[row][column] = 0.1
    _, _, (weight,) = attached(callback, {"a": matrix})
    callback.update([weight], 0.125, 1.0)
    return weight


# ---------------------------------------------------------------------- updates


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_cht_drops_the_smallest_weight_and_grows_the_likeliest_link(predictor):
    assert ch3_l3p(torch.tensor(LINKS, dtype=torch.bool))[2, 1].item() == pytest.approx(1 + 3**-0.5)
    weight = updated(1, 2, predictor=predictor)
    assert grid(weight) == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert weight.W.tolist() == GRAPH, "the new link is 0"


def test_a_link_that_is_removed_and_predicted_again_stays_as_it_is():
    weight = updated(2, 1)
    assert grid(weight) == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert weight.W[2, 1] == torch.tensor(0.1)


def test_soft_links_are_drawn_by_importance_and_score():
    dropped, grown = torch.zeros(12), torch.zeros(12)
    matrix = [[4.0, 3.0, 0.0, 0.0], [0.0, 2.0, 0.0, 5.0], [0.0, 1.0, 1.0, 2.0]]
    callback = CHT(0.5, soft=True, predictor="CH2-L3n")
    _, _, (weight,) = attached(callback, {"a": matrix})
    callback._temperature = 2.0
    left = weight.mask.clone()
    left.view(-1)[9] = False
    for _ in range(600):
        kept = callback.drop(weight, 6, 1.0)
        dropped[[place for place in weight.active_indices.tolist() if place not in kept.tolist()]] += 1
        grown[callback.grow(weight, 1, torch.tensor([9]))] += 1
    S = torch.tensor(matrix).flatten().square()
    assert fits(dropped, 600 * S / S.sum())  # the one that stays
    scores = ch2_l3n(left).flatten() * ~left.flatten()
    assert fits(grown, 600 * scores / scores.sum())


def test_relative_importance_is_that_of_its_definition():
    matrix = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)) * (torch.arange(24).view(3, 4, 2) % 3 > 0)
    _, _, (weight,) = attached(CHT(0.5), {"a": matrix.tolist()})
    W = matrix.abs()
    expected = W / W.sum((1, 2), keepdim=True) + W / W.sum((0, 2), keepdim=True)
    assert torch.allclose(criteria.relative_importance(weight), expected[matrix != 0])


def test_alpha_mixes_magnitude_and_relative_importance():
    # by magnitude 0.3 goes; relative to its neurons it is all there is
    matrix = {"a": [[0.3, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, 6.0, 4.0]]}
    for alpha, smallest in ((1.0, 0), (0.0, 4), (0.5, 4)):
        callback = CHT(0.5, alpha=alpha)
        _, _, (weight,) = attached(callback, matrix)
        assert callback.drop(weight, 1, 1.0).tolist() == [smallest]


def test_equal_scores_are_spread():
    callback = CHT(0.5)
    _, _, (weight,) = attached(callback, {"a": (torch.eye(8) * torch.arange(1, 9)).tolist()})  # no path of three
    grown = callback.grow(weight, 8, torch.empty(0, dtype=torch.long))
    assert max((grown // 8).bincount().tolist() + (grown % 8).bincount().tolist()) == 2


# ---------------------------------------------------------------------- draws


def test_a_race_draws_without_replacement_in_proportion():
    chances = torch.tensor([1.0, 2.0, 3.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    pairs = torch.zeros(4, 4)
    for _ in range(1500):
        first, second = sampling.race(chances, generator).argsort(descending=True)[:2]
        pairs[first, second] += 1
    p = chances / 6
    assert fits(pairs, 1500 * p.unsqueeze(1) * p / (1 - p.unsqueeze(1)) * (1 - torch.eye(4)))


def test_what_has_no_chance_comes_last_and_what_is_no_number_first():
    order = sampling.race(torch.tensor([0.0, 1.0, 0.0, float("nan")]), torch.Generator()).argsort(descending=True)
    assert order[:2].tolist() == [3, 1]


# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize("options", [{}, {"soft": True, "predictor": "CH2-L3n", "alpha": 0.0}])
@pytest.mark.parametrize("net", [None, cnn])
@pytest.mark.filterwarnings("ignore:.*grows some connections at random")
def test_the_budget_of_each_layer_is_kept(net, options):
    watch, _, _ = watched(CHT(0.7, update_every=2, **options), **({} if net is None else {"net": net}))
    assert len({tuple(counts) for counts in watch.counts}) == 1
    assert sum(watch.counts[0]) == budget(0.7, watch.callback.size)
    assert watch.moves > 1


def test_the_temperature_rises_from_1_to_3():
    callback = CHT(0.7, soft=True, update_every=5)
    seen = []
    callback.update = lambda weights, fraction, scale: seen.append(callback._temperature)
    fit(callback, train=loader(160), max_epochs=2)  # moves end at step 30
    assert seen == pytest.approx([1 + step / 15 for step in (5, 10, 15, 20, 25)])


def test_weights_that_are_no_matrices_are_told_of():
    with pytest.warns(UserWarning, match=r"at random, as SET does: .* net\.1\.weight, net\.4\.weight are none"):
        fit(CHT(0.7), seeded(lambda: Lit(cnn())), loader(32), max_epochs=1)


def test_a_network_without_a_matrix_is_refused():
    class Convolutions(Lit):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 4, 12), nn.Flatten()))

    with pytest.raises(MisconfigurationException, match=r"net\.1\.weight are none\. Include linear layers, or use SET"):
        fit(CHT(0.7), seeded(Convolutions), loader(32), max_epochs=1)


def test_paths_that_take_long_are_told_of(monkeypatch):
    monkeypatch.setattr(cht, "_MANY_PATHS", 10)
    with pytest.warns(
        UserWarning, match=r"goes through many paths in each update: \d.* in net\.\d\.weight\. Use predictor='"
    ):
        fit(CHT(0.7, update_every=2), train=loader(64), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "CH4"}, r"predictor must be one of \['CH2-L3n', 'CH3-L3p'\], got 'CH4'"),
        ({"alpha": 1.5}, r"alpha must be a number from 0 to 1, got 1\.5"),
        ({"soft": "yes"}, r"soft must be"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CHT(0.9, **options)
