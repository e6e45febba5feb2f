"""The optimizer state that grown connections start with, against means taken one element at a time."""

from collections import defaultdict
from statistics import fmean

import pytest
import torch
from torch import nn

from lightning_sparse.storage import SparseConv2d, SparseLinear
from lightning_sparse.weights.base import optimizer_state
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.sparse import SparseWeight


class Other(torch.optim.SGD):
    """One of another package: a name that ours knows, and one that it does not."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"exp_avg_sq": p.grad.square(), "hessian": p.grad.clone(), "rows": p.grad.sum()}


#: optimizer, what starts at the mean of the others, and what starts at a number
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"exp_avg_sq"}, {"exp_avg": 0}),
    "Adam fused": (lambda p: torch.optim.Adam(p, fused=True), {"exp_avg_sq"}, {"exp_avg": 0}),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
        {"exp_avg_sq", "max_exp_avg_sq"},
        {"exp_avg": 0},
    ),
    "NAdam": (torch.optim.NAdam, {"exp_avg_sq"}, {"exp_avg": 0}),
    "RAdam": (torch.optim.RAdam, {"exp_avg_sq"}, {"exp_avg": 0}),
    "Adamax": (torch.optim.Adamax, {"exp_inf"}, {"exp_avg": 0}),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        {"square_avg"},
        {"grad_avg": 0, "momentum_buffer": 0},
    ),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.3), {"sum"}, {}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg", "acc_delta"}, {}),
    "Rprop": (lambda p: torch.optim.Rprop(p, 0.02), set(), {"step_size": 0.02, "prev": 0}),
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), set(), {"momentum_buffer": 0}),
    "other": (lambda p: Other(p, 0.1), {"exp_avg_sq"}, {"hessian": 0}),
}

contiguous, channels_last = torch.contiguous_format, torch.channels_last
LAYOUTS = {  # shape, groups of a transposed convolution, order of memory, dtype
    "linear": ((6, 9), 0, contiguous, torch.float32),
    "linear in bfloat16": ((6, 9), 0, contiguous, torch.bfloat16),
    "convolution": ((5, 4, 2, 3), 0, contiguous, torch.float32),
    "channels last": ((5, 4, 2, 3), 0, channels_last, torch.float64),
    "transposed": ((4, 5, 2, 2), 1, contiguous, torch.float32),
    "transposed, channels last, in groups": ((4, 3, 2, 2), 2, channels_last, torch.float32),
}


def neuron(position, shape, transposed_groups):
    """What reads a connection: the filter, counted within its group where a convolution is transposed."""
    index = torch.unravel_index(torch.tensor(position), shape)
    return (int(index[0]) * transposed_groups // shape[0], int(index[1])) if transposed_groups else int(index[0])


def mean_by_hand(state, staying, grown, transposed_groups, otherwise):
    others = defaultdict(list)
    for position in staying:
        others[neuron(position, state.shape, transposed_groups)].append(state.double().reshape(-1)[position].item())
    everywhere = [x for row in others.values() for x in row]
    of_layer = fmean(everywhere) if everywhere else otherwise
    rows = [others.get(neuron(position, state.shape, transposed_groups)) for position in grown]
    return [fmean(row) if row else of_layer for row in rows]


def moves(mask, transposed_groups):
    """Connections to drop and to grow, so that two neurons lose all, of which one gets new ones."""
    shape, active = mask.shape, mask.reshape(-1).nonzero()[:, 0]
    first, second = (neuron(int(active[i]), shape, transposed_groups) for i in (0, -1))
    of = [neuron(position, shape, transposed_groups) for position in range(mask.numel())]
    dropped = [p for i, p in enumerate(active.tolist()) if of[p] in (first, second) or i % 4 == 0]
    free = (~mask).reshape(-1).nonzero()[:, 0].tolist()
    grown = [p for i, p in enumerate(free) if of[p] != second and (of[p] == first or i % 3 == 0)]
    assert {first} < {of[p] for p in grown}
    return torch.tensor(dropped), torch.tensor(grown)


def train(weight, optimizer, steps=4):
    """Give a weight some steps with gradients of very different sizes, as neurons have."""
    generator = torch.Generator().manual_seed(1)
    weight.optimizer = optimizer([weight.parameter])
    for _ in range(steps):
        gradient = torch.randn(weight.shape, generator=generator)
        gradient *= 10.0 ** torch.arange(len(gradient)).view(-1, *[1] * (gradient.ndim - 1)).div(3)
        if isinstance(weight, SparseWeight):
            gradient = gradient.reshape(-1)[weight.active_indices]
        weight.parameter.grad = torch.empty_like(weight.parameter).copy_(gradient)
        weight.keep_zero_gradients()
        weight.optimizer.step()
        weight.keep_zeros()


def masked_weight(shape, transposed_groups, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < 0.4
    value = torch.randn(shape, generator=generator).to(dtype).mul_(mask)
    if len(shape) == 4:
        mask, value = (x.contiguous(memory_format=layout) for x in (mask, value))
    return MaskedWeight("weight", mask, nn.Parameter(value), transposed_groups=transposed_groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scales_of_grown_connections_start_at_the_mean_of_their_neurons_others(name, layout):
    optimizer, means, numbers = OPTIMIZERS[name]
    shape, groups, memory_format, dtype = LAYOUTS[layout]
    weight = masked_weight(shape, groups, memory_format, dtype)
    train(weight, optimizer)
    dropped, grown = moves(weight.mask, groups)
    staying = [p for p in weight.active_indices.tolist() if p not in dropped.tolist()]
    before = {key: state.clone() for key, state in optimizer_state(weight)}
    assert before.keys() == means | numbers.keys()
    weight.rewire(dropped, grown)
    rel = 1e-2 if dtype is torch.bfloat16 else 1e-5
    for key, state in optimizer_state(weight):
        flat, old = state.reshape(-1), before[key].reshape(-1)
        assert torch.equal(flat[staying], old[staying])
        assert not flat[dropped].any()
        if key in means:
            expected = mean_by_hand(before[key], staying, grown.tolist(), groups, 0.0)
            assert len({round(x, 9) for x in expected}) > 2, "the test would prove nothing"
            assert flat[grown].tolist() == pytest.approx(expected, rel=rel)
        else:
            assert flat[grown].tolist() == pytest.approx([numbers[key]] * len(grown), rel=rel)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layer", ["linear", "convolution in groups"])
def test_sparse_and_masked_weights_start_what_they_grow_alike(layer, name):
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(9, 6) if layer == "linear" else nn.Conv2d(4, 6, 3, groups=2)
    kind = SparseLinear if layer == "linear" else SparseConv2d
    mask = torch.rand(dense.weight.shape, generator=generator) < 0.4
    layer = kind.from_dense(dense, mask.reshape(-1).nonzero()[:, 0])
    sparse = SparseWeight("weight", dense.weight.shape, layer)
    masked = MaskedWeight("weight", mask, nn.Parameter(layer.dense_weight()))
    dropped, grown = moves(mask, 0)
    shuffled = grown[torch.randperm(len(grown), generator=generator)]
    for weight in (sparse, masked):
        train(weight, OPTIMIZERS[name][0])
        weight.rewire(dropped, shuffled)
    assert torch.equal(sparse.mask, masked.mask)
    for (key, state), (other, dense_state) in zip(optimizer_state(sparse), optimizer_state(masked), strict=True):
        assert key == other
        assert torch.equal(state != 0, dense_state.reshape(-1)[sparse.active_indices] != 0)
        torch.testing.assert_close(state, dense_state.reshape(-1)[sparse.active_indices])


def test_where_no_connection_stays_new_ones_start_as_in_a_new_layer():
    layer = SparseLinear(5, 4, 8, generator=torch.Generator().manual_seed(0))
    sparse = SparseWeight("weight", (4, 5), layer)
    masked = MaskedWeight("weight", sparse.mask, nn.Parameter(layer.dense_weight()))
    dropped, grown = sparse.active_indices, (~sparse.mask).reshape(-1).nonzero()[:6, 0]
    for weight in (sparse, masked):
        train(weight, OPTIMIZERS["Adagrad"][0])
        weight.rewire(dropped, grown)
    assert dict(optimizer_state(sparse))["sum"].tolist() == pytest.approx([0.3] * 6)
    assert dict(optimizer_state(masked))["sum"].reshape(-1)[grown].tolist() == pytest.approx([0.3] * 6)


def test_a_state_in_another_order_of_memory_than_the_weight_is_read_by_positions():
    """As when a checkpoint has been written in another one."""
    weights = [masked_weight((5, 4, 2, 3), 0, channels_last, torch.float32) for _ in range(2)]
    for weight in weights:
        train(weight, torch.optim.Adam)
    state = weights[1].optimizer.state[weights[1].parameter]
    state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    dropped, grown = moves(weights[0].mask, 0)
    for weight in weights:
        weight.rewire(dropped, grown)
    first, second = (dict(optimizer_state(weight))["exp_avg_sq"] for weight in weights)
    assert torch.equal(first, second)


def test_what_an_optimizer_keeps_where_a_weight_is_not_active_does_not_count():
    weight = masked_weight((6, 9), 0, contiguous, torch.float32)
    train(weight, torch.optim.Adam)
    state = weight.optimizer.state[weight.parameter]["exp_avg_sq"]
    state[~weight.mask] = float("inf")
    dropped, grown = moves(weight.mask, 0)
    weight.rewire(dropped, grown)
    assert state.reshape(-1)[grown].isfinite().all()
