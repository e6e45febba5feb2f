"""The share of weights whose gradient is used, which theoretical FLOPs count: two small layers, worked out by hand."""

import pytest
import torch
from torch import nn

from lightning_sparse import DFBST, DST, SET, SNFS, STR, AutoSparse, OptG, TopKAST
from lightning_sparse.layers.selection import select_parameters

W = torch.tensor([[0.5, -0.2, 0.1], [-0.3, 0.3, 0.05]])
V = torch.tensor([[0.35, -0.4]])


def logit(p):
    return torch.logit(torch.tensor([p])).tolist()


def attached(callback, thresholds=()):
    """A callback that has taken over ``W`` and ``V``, with thresholds as given for each."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    module[0].weight.data, module[1].weight.data = W.clone(), V.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=1e-9)
    callback.attach(select_parameters(module), [optimizer], resumed=False)
    for name, values in thresholds:
        for weight, value in zip(callback._weights.values(), values, strict=True):
            weight.thresholds[name].data.copy_(torch.tensor(value))
            with torch.no_grad():
                callback._projection.project([weight])
    return module, optimizer


def densities(callback):
    return list(callback.layer_density.values()), list(callback.layer_gradient_density.values())


def test_dst_uses_all_gradients():
    callback = DST(alpha=0)
    attached(callback, [("t", [[0.15, 0.3], [0.375]])])
    assert densities(callback) == ([2 / 6, 1 / 2], [1, 1])
    assert callback.gradient_density == 1


def test_dfbst_uses_those_of_its_backward_masks():
    callback = DFBST(alpha=0, beta=0)
    module, optimizer = attached(callback, [("t_b", [[0.25, -0.4], [0.5]])])
    assert densities(callback) == ([1, 1], [1, 1])  # no step yet
    module[0].weight.grad = torch.tensor([[6.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    module[1].weight.grad = torch.tensor([[1.0, 3.0]])
    callback.before_step(optimizer, 1.0, 1.0)
    # dW = dP (1 + |W| H): 7.2 -3.72 1.16 / 0 0 0, shares 0.60 0.31 0.10; 1.21 3.48, shares 0.26 0.74
    assert densities(callback) == ([1, 1], [2 / 6, 1 / 2])
    assert callback.gradient_density == callback.backward_density == 3 / 8


@pytest.mark.parametrize(("alpha", "share", "expected"), [(0.5, None, 1), (0.5, 0.75, 0.75), (0, 0.75, 4 / 8)])
def test_autosparse_uses_all_or_b_or_without_alpha_the_active_ones(alpha, share, expected):
    callback = AutoSparse(alpha=alpha, backward_density=share)
    attached(callback, [("t", [logit(0.25), logit(0.375)])])
    assert densities(callback) == ([3 / 6, 1 / 2], [expected] * 2)
    assert callback.gradient_density == expected


def test_str_uses_those_of_active_weights():
    callback = STR(init_threshold=-5)
    attached(callback, [("t", [logit(0.15), logit(0.15)])])
    assert densities(callback) == ([4 / 6, 1], [4 / 6, 1])
    assert callback.gradient_density == 6 / 8


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [2 / 6, 1]), (0.0, [1 / 6, 1 / 2])])
def test_topkast_uses_b_or_without_alpha_a(alpha, expected):
    callback = TopKAST(0.75, 0.5, alpha=alpha, scope="global")  # A: 0.5 0.4; B: 0.5 0.4 0.35 and the first 0.3
    attached(callback)
    assert densities(callback) == ([1 / 6, 1 / 2], expected)
    assert callback.gradient_density == callback.backward_density == (4 / 8 if alpha else 2 / 8)


def test_optg_uses_all_gradients_for_its_scores():
    callback = OptG(0.5)
    attached(callback)
    callback._weights["0.weight"].buffers["A"][1] = False
    assert densities(callback) == ([3 / 6, 1], [1, 1])
    assert callback.gradient_density == 1


def test_snfs_uses_all_gradients_for_its_momentum():
    callback = SNFS(0.5, distribution="uniform")
    attached(callback)
    assert densities(callback) == ([3 / 6, 1 / 2], [1, 1])
    assert callback.gradient_density == 1


def test_a_fixed_budget_uses_those_of_active_weights():
    callback = SET(0.5, distribution={"0.*": 1 / 3, "1.*": 1.0})
    attached(callback)
    assert densities(callback) == ([2 / 6, 1], [2 / 6, 1])
    assert callback.gradient_density == 4 / 8
