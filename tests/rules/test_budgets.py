"""Budgets are divided in whole numbers: hand-worked, by RigL's published rule, and exact in any case."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.rules.budgets import (
    DISTRIBUTIONS,
    apportion,
    budget,
    er,
    erk,
    layer_counts,
    portion,
    uniform,
    uniform_first_dense,
)

LENET300 = [(300, 784), (100, 300), (10, 100)]
CONVOLUTIONS = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
RESNET = [(64, 3, 3, 3), *[(64, 64, 3, 3)] * 4, (128, 64, 3, 3), (128, 64, 1, 1), *[(512, 512, 3, 3)] * 3, (10, 512)]


def test_erk_of_lenet_300_100_is_as_worked_out_by_hand():
    # 10 % of 266,200; sums of dimensions 1084 : 400 : 110. 26620 * 110 / 1594 = 1837 is over the last layer's 1000: it
    # is dense, and 25620 are shared 1084 : 400, which is 18714.3 and 6905.7
    assert erk(LENET300, 26620) == [18714, 6906, 1000]


def test_er_leaves_the_kernel_out_and_erk_counts_it():
    # ER: (c_in + c_out) k_h k_w: (1 + 20) 25 = 525, (20 + 50) 25 = 1750; ERK: 1 + 20 + 5 + 5 = 31, 20 + 50 + 10 = 80
    shapes = [(20, 1, 5, 5), (50, 20, 5, 5)]
    assert er(shapes, 455) == [105, 350]
    assert erk(shapes, 444) == [124, 320]


def test_uniform_gives_each_layer_the_same_density():
    assert uniform([(10, 10), (20, 10), (1, 100)], 40) == [10, 20, 10]
    assert uniform_first_dense([(10, 10), (20, 10), (1, 100)], 130) == [100, 20, 10]
    with pytest.raises(ValueError, match=r"first layer whole, which has 100 weights, but sparsity leaves 40 in all"):
        uniform_first_dense([(10, 10), (20, 10)], 40)


def published_rule(shapes, density):
    """RigL's get_sparsities_erdos_renyi with its kernel included, written out after the paper's appendix."""
    dense = set()
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for i, shape in enumerate(shapes):
            n = math.prod(shape)
            if i in dense:
                rhs -= n * (1 - density)
            else:
                rhs += n * density
                raw[i] = sum(shape) / n
                divisor += raw[i] * n
        epsilon = rhs / divisor
        over = {i for i, probability in raw.items() if probability * epsilon > 1}
        if not over:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= over


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("shapes", [LENET300, CONVOLUTIONS, RESNET])
def test_erk_is_the_published_rule_to_less_than_one_weight(shapes, sparsity):
    sizes = [math.prod(shape) for shape in shapes]
    total = budget(sparsity, sum(sizes))
    counts = erk(shapes, total)
    expected = published_rule(shapes, total / sum(sizes))
    assert sum(counts) == total
    assert all(abs(n - d * size) < 1 for n, d, size in zip(counts, expected, sizes, strict=True))
    assert any(n == size for n, size in zip(counts, sizes, strict=True)) == any(d == 1 for d in expected)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=12), st.data())
def test_apportion_uses_up_the_total_and_no_capacity_is_exceeded(pairs, draw):
    weights, capacities = zip(*pairs, strict=True)
    total = draw.draw(st.integers(0, sum(capacities)))
    counts = apportion(total, weights, capacities)
    assert sum(counts) == total
    assert all(0 <= n <= capacity for n, capacity in zip(counts, capacities, strict=True))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(0, 1000))
def test_apportion_is_proportional_to_less_than_one(weights, total):
    counts = apportion(total, weights, [total] * len(weights))
    for n, weight in zip(counts, weights, strict=True):
        assert abs(n - total * weight / sum(weights)) < 1


def test_apportion_refuses_more_than_there_is_room_for():
    with pytest.raises(ValueError, match="8 cannot be divided among capacities that sum up to 7"):
        apportion(8, [1, 1], [3, 4])


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, {"conv*": 0.5}])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.933, 0.95, 0.99])
@pytest.mark.parametrize("floor", [0.0, 0.004])
def test_layers_add_up_to_the_budget_and_keep_the_floor(distribution, sparsity, floor):
    shapes = dict(zip(["conv1", "conv2", "fc1", "fc2"], CONVOLUTIONS, strict=True))
    if isinstance(distribution, dict) and sparsity >= 0.95:
        distribution = {"conv*": 0.01}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = budget(sparsity, sum(sizes.values()))
    counts = layer_counts(distribution, shapes, total, floor)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    assert all(math.ceil(floor * sizes[name] - 1e-6) <= n <= sizes[name] for name, n in counts.items())


def test_a_map_of_densities_leaves_the_rest_to_the_others():
    shapes = {"body.weight": (10, 10), "head.weight": (10, 4), "tail.weight": (10, 6)}
    assert layer_counts({"head.*": 1.0}, shapes, 80) == {"body.weight": 25, "head.weight": 40, "tail.weight": 15}
    assert layer_counts({"*body*": 0.2, "head.*": 0.5, "tail.*": 0.1}, shapes, 46) == {
        "body.weight": 20,
        "head.weight": 20,
        "tail.weight": 6,
    }
    with pytest.raises(ValueError, match="'neck' matches none of"):
        layer_counts({"neck": 0.5}, shapes, 80)
    with pytest.raises(ValueError, match=r"gives 100 weights .* leaves 80 of 200 .* set sparsity=0.5"):
        layer_counts({"body.*": 1.0}, shapes, 80)
    with pytest.raises(ValueError, match=r"gives 46 weights .* leaves 80 of 200 .* set sparsity=0.77"):
        layer_counts({"body.*": 0.2, "head.*": 0.5, "tail.*": 0.1}, shapes, 80)


def test_a_floor_above_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"min_layer_density=0\.5 alone takes 50 weights, the budget is 10"):
        layer_counts("erk", {"a": (10, 10)}, 10, 0.5)


@given(st.integers(0, 10**8), st.integers(0, 1000))
def test_shares_and_budgets_are_exact_where_the_product_is_whole(count, thousandths):
    assert portion(thousandths / 1000, 1000 * count) == thousandths * count
    assert budget(thousandths / 1000, 1000 * count) == (1000 - thousandths) * count
