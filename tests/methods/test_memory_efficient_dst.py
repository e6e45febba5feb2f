"""MemoryEfficientDST: small updates worked out by hand, its limits RigL and SET."""

import copy
import math

import lightning.pytorch as pl
import memory_efficient_dst_ranks
import pytest
import torch
from helpers import Lit, cnn, fit, fits, loader, mlp, seeded
from processes import run_fresh_ranks
from torch import nn

from lightning_sparse import GSE, MemoryEfficientDST
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules import select
from lightning_sparse.rules.matrices import Outputs
from lightning_sparse.rules.parts import Whole
from lightning_sparse.weights.masked import MaskedWeight


def attached(callback, W, dP, grids=None):
    """A callback that has taken over weights ``W``, by name, with gradients; active where they are not 0."""
    module = nn.ParameterDict({name: nn.Parameter(torch.tensor(values)) for name, values in W.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    callback.attach(select_parameters(module, include=["*"]), [optimizer], resumed=False)
    for name, weight in callback._weights.items():
        weight.W.copy_(torch.tensor(W[name]))
        weight.start(torch.tensor((grids or W)[name]).flatten().nonzero()[:, 0], callback.generator)
        module[name].grad = torch.tensor(dP[name])
    return list(callback._weights.values())


def grids(weights):
    return {weight.name: weight.mask.int().tolist() for weight in weights}


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 3, 4))[0][:, -1])


# ---------------------------------------------------------------------- start


def test_weights_are_scaled_to_the_fan_in_that_is_left():
    W, mask = nn.Parameter(torch.ones(3, 4)), torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    MaskedWeight("w", mask, W).scale_to_fan_in_()
    assert W[:, 1].tolist() == [1, 2, 2], "square roots of 4 / 4, 4 / 1, and of 4 / 1 where nothing is left"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fan_in_counts_channels_of_the_group_and_the_kernel(layout):
    dense = torch.rand(6, 2, 3, 3).to(memory_format=layout)
    mask, scaled = torch.rand(6, 2, 3, 3) < 0.3, nn.Parameter(dense.clone(memory_format=torch.preserve_format))
    MaskedWeight("w", mask, scaled).scale_to_fan_in_()
    factor = (18 / mask.sum((1, 2, 3)).clamp(min=1)).sqrt()
    assert torch.allclose(scaled, dense * factor.view(6, 1, 1, 1))


def test_fan_in_of_a_transposed_convolution_is_along_its_first_dimension():
    dense, mask = torch.rand(4, 3, 2), torch.rand(4, 3, 2) < 0.5  # 2 groups of 2 inputs and 3 outputs
    scaled = nn.Parameter(dense.clone())
    MaskedWeight("w", mask, scaled, outputs=Outputs(1, 2)).scale_to_fan_in_()
    for group in range(2):
        rows = slice(2 * group, 2 * group + 2)
        factor = (4 / mask[rows].sum((0, 2)).clamp(min=1)).sqrt()
        assert torch.allclose(scaled[rows], dense[rows] * factor.view(1, 3, 1))


def test_a_fit_starts_uniform_scaled_and_a_second_one_goes_on():
    module = seeded(Lit)
    before = copy.deepcopy(module.state_dict())
    callback = MemoryEfficientDST(0.8)
    fit(callback, module, max_steps=0, max_epochs=-1)
    for name, mask in callback.masks.items():
        assert int(mask.sum()) == pytest.approx(0.2 * mask.numel(), abs=1)
        fan_in = mask.sum(1, keepdim=True).clamp(min=1)
        expected = before[name] * mask * (mask.shape[1] / fan_in).sqrt()
        assert torch.allclose(module.get_parameter(name), expected)
    started = copy.deepcopy(module.state_dict())
    fit(callback, module, max_steps=0, max_epochs=-1)
    assert all(torch.equal(x, started[name]) for name, x in module.state_dict().items())


def test_trained_weights_may_be_taken_as_they_are():
    module = seeded(Lit)
    before = copy.deepcopy(module.state_dict())
    callback = MemoryEfficientDST(0.8, scale_init=False)
    fit(callback, module, max_steps=0, max_epochs=-1)
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name), before[name] * mask)


W = {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.0, -0.4, 0.0]], "b": [[0.3, 0.0], [0.0, -0.05]]}
DP = {"a": [[9.0, 9.0, -3.0, 1.0], [9.0, 2.0, 9.0, -4.0]], "b": [[9.0, 0.5], [-6.0, 9.0]]}

# ---------------------------------------------------------------------- an update worked out by hand


@pytest.mark.parametrize("heuristic", ["random", "grabo", "synflow"])
def test_an_update_drops_and_grows_over_all_layers(heuristic):
    """With all inactive connections sampled it is RigL's growth, over all layers."""
    callback = MemoryEfficientDST(0.5, heuristic=heuristic, subset_multiplier=100)
    weights = attached(callback, W, DP)
    weights[0].optimizer.state[weights[0].parameter]["momentum_buffer"] = torch.ones(2, 4)
    callback.update(weights, 0.5, 1.0)  # 3 of 6: -0.05, 0.1, -0.2 go, -6, -4, -3 come
    assert grids(weights) == {"a": [[1, 0, 1, 0], [0, 0, 1, 1]], "b": [[1, 0], [1, 0]]}
    assert weights[0].W.tolist() == torch.tensor([[0.5, 0, 0, 0], [0, 0, -0.4, 0]]).tolist()
    momentum = weights[0].optimizer.state[weights[0].parameter]["momentum_buffer"]
    assert momentum.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]], "fresh for the dropped and the grown alone"


@pytest.mark.parametrize("density", [0.1, 0.6, 0.95])
def test_with_everything_sampled_growth_is_that_of_rigl_over_all_layers(density):
    torch.manual_seed(0)
    shapes = {"a": (9, 30), "b": (10, 11), "c": (5, 4, 3)}
    values = {name: (torch.randn(shape) * (torch.rand(shape) < density)).tolist() for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape).tolist() for name, shape in shapes.items()}
    callback = MemoryEfficientDST(0.5, heuristic="random", subset_multiplier=1000)
    weights = attached(callback, values, gradients)
    before = [weight.mask for weight in weights]
    callback.update(weights, 0.3, 1.0)
    grown = [weight.mask & ~mask for weight, mask in zip(weights, before, strict=True)]
    moved = sum(map(select.count, grown))
    assert moved == min(int(0.3 * sum(map(select.count, before))), sum(select.count(~mask) for mask in before))
    scores = torch.cat([weight.dP.abs()[~mask] for weight, mask in zip(weights, before, strict=True)])
    bound = scores.sort(descending=True).values[moved - 1]
    for weight, mask, new in zip(weights, before, grown, strict=True):
        assert torch.equal(new, ~mask & (weight.dP.abs() >= bound))


def test_no_layer_falls_below_the_least_density():
    callback = MemoryEfficientDST(0.5, heuristic="random", subset_multiplier=100, min_layer_density=0.5)
    weights = attached(callback, W, DP)
    callback.update(weights, 0.5, 1.0)  # a has 4 of 8, b has 2 of 4: nothing may go
    assert grids(weights) == {name: (torch.tensor(values) != 0).int().tolist() for name, values in W.items()}
    callback = MemoryEfficientDST(0.5, heuristic="random", subset_multiplier=100, min_layer_density=0.25)
    weights = attached(callback, W, DP)
    callback.update(weights, 0.7, 1.0)  # a may lose 2 and b 1: -0.05, 0.1, -0.2, and not 0.3
    assert grids(weights) == {"a": [[1, 0, 1, 0], [0, 0, 1, 1]], "b": [[1, 0], [1, 0]]}


def test_no_more_is_dropped_than_there_is_room_for():
    dense = {"a": [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]], "b": [[0.1, 0.2]]}
    callback = MemoryEfficientDST(0.1, heuristic="random", subset_multiplier=3)
    weights = attached(callback, dense, dense)
    callback.update(weights, 0.9, 1.0)
    assert grids(weights) == {"a": [[1, 1, 1], [1, 1, 1]], "b": [[0, 1]]}, "one place was free"


def test_with_multiplier_1_growth_is_random_as_in_set():
    """Whatever the gradients, and in proportion to the layers' sizes: 2 in a, 1 in b."""
    callback, counts = MemoryEfficientDST(0.5, heuristic="random", subset_multiplier=1), torch.zeros(12)
    for seed in range(600):
        weights = attached(callback, W, DP)
        callback.generator.manual_seed(seed)
        before = torch.cat([weight.mask.flatten() for weight in weights])
        callback.update(weights, 0.5, 1.0)
        grown = torch.cat([weight.mask.flatten() for weight in weights]) & ~before
        assert (int(grown[:8].sum()), int(grown[8:].sum())) == (2, 1)
        counts += grown
    free = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0]).bool()
    assert fits(counts[:8], 600 * 2 / 4 * free[:8])
    assert fits(counts[8:], 600 * 1 / 2 * torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("multiplier", [1, 2.5, 4])
def test_subsets_are_proportional_to_layer_sizes_and_hold_nothing_active_or_dropped(multiplier):
    drawn = {}
    shapes = {"a": (10, 30), "b": (10, 10), "c": (5, 20)}
    torch.manual_seed(0)
    values = {name: (torch.rand(shape) * (torch.rand(shape) < 0.2)).tolist() for name, shape in shapes.items()}
    callback = MemoryEfficientDST(0.8, heuristic="random", subset_multiplier=multiplier)
    weights = attached(callback, values, values)
    active = {weight.name: weight.mask.flatten() for weight in weights}
    draw = callback.subsets
    callback.subsets = lambda weights, n: drawn.setdefault("subsets", draw(weights, n))
    callback.update(weights, 0.3, 1.0)
    moved = int(0.3 * sum(int(mask.sum()) for mask in active.values()))
    sizes = [len(subset) for subset in drawn["subsets"]]
    assert sum(sizes) == int(multiplier * moved)
    assert sizes == pytest.approx([0.6 * sum(sizes), 0.2 * sum(sizes), 0.2 * sum(sizes)], abs=1)
    for weight, subset in zip(weights, drawn["subsets"], strict=True):
        assert not active[weight.name][subset].any()
    grown = [(weight.mask.flatten() & ~active[weight.name]) for weight in weights]
    assert sum(int(mask.sum()) for mask in grown) == moved
    for mask, subset in zip(grown, drawn["subsets"], strict=True):
        assert mask.sum() == mask[subset].sum(), "grown from the subset alone"


class Watch(pl.Callback):
    """After every step: the budget; and how many hooks there were while it ran."""

    def __init__(self, callback):
        self.callback, self.counts, self.masks, self.hooks = callback, set(), [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.hooks.append(hooks(pl_module))

    def on_before_backward(self, trainer, pl_module, loss):
        self.during = hooks(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.counts.add(sum(select.count(mask) for mask in self.callback.masks.values()))
        self.masks.append((self.during, self.callback.masks))
        for name, mask in self.callback.masks.items():
            assert not pl_module.get_parameter(name)[~mask].any()


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("heuristic", ["random", "grabo", "synflow"])
@pytest.mark.parametrize("build", [mlp, cnn, LSTM])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.filterwarnings("ignore:.*draws the endpoints of some weights uniformly")
@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_the_budget_is_exact_after_every_update(heuristic, build, sparsity):
    callback = MemoryEfficientDST(
        sparsity, heuristic=heuristic, subset_multiplier=3, drop_fraction=0.5, update_every=4, stop_at=1.0
    )
    watch = Watch(callback)
    module, _ = fit([callback, watch], seeded(lambda: Lit(build())), max_epochs=1)
    size = sum(mask.numel() for mask in callback.masks.values())
    assert watch.counts == {size - round(sparsity * size)}
    moves = [
        step
        for step, ((_, a), (_, b)) in enumerate(zip(watch.masks, watch.masks[1:], strict=False), 1)
        if any(not torch.equal(a[name], b[name]) for name in a)
    ]
    assert moves
    assert set(moves) <= {4, 8, 12, 16, 20, 24, 28}
    watched = [step for step, (during, _) in enumerate(watch.masks) if during]
    assert watched == ([] if heuristic == "random" else [4, 8, 12, 16, 20, 24, 28]), "hooks for these steps alone"
    assert not any(watch.hooks), "none are left when the optimizer steps"
    assert not hooks(module)


@pytest.mark.parametrize("heuristic", ["grabo", "synflow"])
@pytest.mark.parametrize("moment", ["forward", "backward", "update"])
def test_no_hook_is_left_by_an_exception(heuristic, moment, monkeypatch):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5 and moment == "forward":
                assert hooks(self)
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            if self.trainer.global_step == 5 and moment == "backward":
                assert hooks(self)
                raise ArithmeticError

    if moment == "update":
        monkeypatch.setattr(Whole, "global_top_k", lambda *args: 1 / 0)
    callback, module = MemoryEfficientDST(0.8, heuristic=heuristic, update_every=5), seeded(Fails)
    with pytest.raises(ArithmeticError):
        fit(callback, module)
    assert not hooks(module)
    assert not callback._watch._hooks


def test_the_last_step_leaves_no_hooks_even_if_the_next_one_would_move():
    callback = MemoryEfficientDST(0.8, update_every=5, stop_at=1.0)

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 4

    module, run = fit([callback, Stops()], max_epochs=3)
    assert run.global_step == 5
    assert not hooks(module)


def test_two_processes_with_different_data_draw_and_move_the_same():
    """They compare themselves after every step."""
    run_fresh_ranks(memory_efficient_dst_ranks.run_all, 2)


# ---------------------------------------------------------------------- the published program's choices


def test_gse_is_the_name_of_the_published_paper_for_the_same_class():
    assert GSE is MemoryEfficientDST
    assert repr(GSE(0.9, heuristic="graest")) == "MemoryEfficientDST(sparsity=0.9, heuristic='graest')"
    assert GSE(0.9).state_key == MemoryEfficientDST(0.9).state_key
    assert (GSE(0.9).multiplier, GSE(0.9, subset="active").multiplier) == (10, 1)


def test_a_subset_goes_with_the_active_connections_of_its_layer_and_is_all_of_a_half_dense_one():
    places = {"a": torch.arange(200).view(10, 20) % 10 == 0, "b": torch.arange(60).view(6, 10) % 3 == 0}
    places["c"] = torch.arange(24).view(4, 6) % 2 == 0
    for multiplier, expected in ((1, [20, 20, 12]), (0.25, [5, 5, 12]), (2.5, [50, 40, 12])):
        callback = GSE(0.5, heuristic="random", subset="active", subset_multiplier=multiplier)
        W = {name: grid.float().tolist() for name, grid in places.items()}
        weights = attached(callback, W, {name: torch.rand(grid.shape).tolist() for name, grid in places.items()})
        assert callback.subset_counts(weights, 7) == expected
        callback.update(weights, 1.0, 1.0)
        assert sum(weight.num_active for weight in weights) == 52, "no more move than were sampled"
    assert [len(subset) for subset in callback.subsets(weights, [3, 2, 1])] == [3, 2, 1]


def test_the_programs_choices_train_with_both_stores_alike():
    options = {"heuristic": "graest", "subset": "active", "distribution": "er", "drop_fraction": 0.5}
    callbacks = [GSE(0.8, update_every=4, stop_at=1.0, storage=kind, **options) for kind in ("masked", "sparse")]
    for callback in callbacks:
        fit(callback, seeded(lambda: Lit(mlp(torch.float64))), loader(120, dtype=torch.float64), precision="64-true")
        assert callback.size - sum(callback.layer_count.values()) == round(0.8 * callback.size)
    first, second = callbacks
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heuristic": "rigl"}, r"heuristic must be one of \['grabo', 'graest', 'random', 'synflow'\], got 'rigl'"),
        ({"subset_multiplier": 0.5}, 'subset_multiplier must be at least 1 with subset="size", got 0.5: .* With 1 all'),
        ({"subset": "active", "subset_multiplier": 0}, "subset_multiplier must be .*above 0, got 0"),
        ({"subset": "all"}, r"subset must be one of \['active', 'size'\], got 'all'"),
        ({"subset_multiplier": math.inf}, "subset_multiplier must be a finite number"),
        ({"drop_fraction": 0}, "drop_fraction must be above 0, got 0"),
        ({"update_every": 0}, "update_every must be an integer of at least 1"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryEfficientDST(0.9, **options)
