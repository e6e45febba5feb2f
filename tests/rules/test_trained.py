"""Weights that look trained: none that an initialisation has made, and those of networks that have been trained."""

import math

import pytest
import torch
from helpers import Lit, cnn, fit, loader, mlp, seeded
from torch import nn

from lightning_sparse.layers.seen import behind_seen_norms
from lightning_sparse.rules.trained import looks_trained

FRESH = {
    "torch's default": lambda W: nn.init.kaiming_uniform_(W, a=math.sqrt(5)),
    "Kaiming, uniform": nn.init.kaiming_uniform_,
    "Kaiming, normal": nn.init.kaiming_normal_,
    "Xavier, uniform": nn.init.xavier_uniform_,
    "Xavier, normal": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "truncated normal": lambda W: nn.init.trunc_normal_(W, std=1.0, a=-2.0, b=2.0),
    "normal of a small scale, in half precision": lambda W: W.copy_((torch.randn_like(W) * 2e-5).half()),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "a row of zeros, as of a padding index": lambda W: nn.init.normal_(W)[0].zero_(),
    "identity": lambda W: nn.init.eye_(W) if W.ndim == 2 else nn.init.dirac_(W),
}
SHAPES = [(10, 64), (256, 64), (16, 8), (64, 16, 3, 3), (128, 1, 3, 3), (4, 1000), (300, 784), (64, 256, 1, 1)]


@pytest.mark.parametrize("fresh", FRESH)
@torch.no_grad()
def test_no_fresh_weight_looks_trained(fresh):
    for seed in range(6):
        for shape in SHAPES:
            torch.manual_seed(seed)
            W = torch.empty(shape)
            FRESH[fresh](W)
            assert not looks_trained(W), (shape, seed)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU])
def test_no_fresh_recurrent_or_attention_weight_looks_trained(build):
    for layer in (build(32, 64), nn.TransformerEncoderLayer(64, 4, 128), nn.Embedding(50, 32, padding_idx=0)):
        assert not [name for name, p in layer.named_parameters() if p.ndim > 1 and looks_trained(p)]


def test_a_network_that_was_trained_for_a_while_looks_so():
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    module = seeded(lambda: Lit(net))
    assert not looks_trained(net[2].weight)
    fit([], module, max_epochs=1)
    assert looks_trained(net[2].weight)


@torch.no_grad()
def test_zeros_among_other_values_look_trained_and_a_weight_that_is_not_finite_does_not():
    W = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert not looks_trained(W)
    pruned = W * (W.abs() > 0.2)
    assert looks_trained(pruned)
    pruned[0, 0] = torch.nan
    assert not looks_trained(pruned)


def test_convolutions_before_a_batch_norm_with_statistics_of_a_training_look_trained():
    def named(module):
        return behind_seen_norms(module, {n: len(p) for n, p in module.named_parameters() if p.ndim > 1})

    module = seeded(lambda: Lit(cnn()))
    assert named(module) == set()
    for _ in range(5):  # examples that find out shapes
        module(torch.ones(8, 12))
    assert named(module) == set()
    fit([], module, loader(160), max_epochs=1)
    assert named(module) == {"net.4.weight"}
    module.net[5].num_batches_tracked.zero_()  # of a checkpoint that has no such number
    assert named(module) == {"net.4.weight"}
    module.net[5].requires_grad_(False)  # a frozen network before a new head
    assert named(module) == set()
    assert named(mlp()) == set()
