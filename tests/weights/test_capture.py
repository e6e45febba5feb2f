"""Gradients that sparse layers compute for connections that do not exist, against autograd's of the dense layer."""

from contextlib import closing

import pytest
import torch
from helpers import Lit, fit, loader, mlp, seeded
from stored import measured
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse import RigL
from lightning_sparse.storage import SparseConv2d, SparseLinear
from lightning_sparse.weights.captured import Capture
from lightning_sparse.weights.sparse import SparseWeight

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pair:
    """The same network with a sparse and with a dense first layer."""

    def __init__(self, build=lambda: (SparseLinear(6, 6, 12, dtype=torch.float64), nn.Identity())):
        torch.manual_seed(1)
        self.layer, front = build()
        self.dense = self.layer.to_dense()
        torch.manual_seed(2)
        head = nn.Linear(6, 1, dtype=torch.float64)
        self.networks = [
            nn.Sequential(front, layer, nn.Tanh(), nn.Flatten(), head) for layer in (self.layer, self.dense)
        ]
        self.weight = SparseWeight("weight", self.layer.shape, self.layer)

    def compare(self, step):
        """Take a step with both, and compare the gradients of all connections."""
        with closing(Capture({"weight": self.layer}, {"weight": self.weight.gradient}, torch.Tensor.detach)):
            for network in self.networks:
                step(network)
            expected = torch.zeros(()) if self.dense.weight.grad is None else self.dense.weight.grad
            found = self.weight.gradient_at(torch.arange(self.weight.size)).view(self.weight.shape)
            assert torch.allclose(found, expected.expand_as(found).to(found), rtol=0, atol=1e-12)
            if self.layer.values.grad is not None:
                own = found.reshape(-1)[self.layer.positions]
                assert torch.allclose(own, self.layer.values.grad, rtol=0, atol=1e-12)
        return found

    def __call__(self, step):
        return self.compare(step).abs().max() > 0


def loss(network, x=X):
    return network(x).square().sum()


def test_a_backward_pass():
    assert Pair()(lambda network: loss(network).backward())


def test_a_convolution():
    pair = Pair(lambda: (SparseConv2d(2, 3, 2, 10, dtype=torch.float64), nn.Unflatten(1, (2, 2, 3))))
    pair.networks = [network[:-1] for network in pair.networks]
    x = torch.cat((X, X), 1)
    assert pair(lambda network: loss(network, x).backward())


def test_batches_are_accumulated():
    def step(network):
        for x in (X[:2], X[2:]):
            loss(network, x).backward()

    assert Pair()(step)


def test_a_layer_is_called_twice_in_a_forward_pass():
    def step(network):
        loss(network, network[1](X)).backward()

    assert Pair()(step)


@pytest.mark.parametrize("before", [True, False])
def test_gradients_that_autograd_returns_do_not_count(before):
    """As for an adversarial example or a penalty; the graph may be the one that is trained, too."""

    def step(network):
        if not before:
            loss(network).backward()
        x = X.clone().requires_grad_()
        found = loss(network, x)
        (slope,) = torch.autograd.grad(found, x, retain_graph=True)
        assert slope.any()
        torch.autograd.grad(found, next(network[1].parameters()), retain_graph=True)
        if before:
            found.backward()

    assert Pair()(step)


def test_a_pass_to_other_parameters_alone_does_not_count():
    def step(network):
        loss(network).backward(inputs=list(network[-1].parameters()))

    assert not Pair()(step)


def test_a_pass_through_a_frozen_layer_does_not_count():
    pair = Pair()

    def step(network):
        network[1].requires_grad_(False)
        x = X.clone().requires_grad_()
        loss(network, x).backward()
        assert x.grad.any()
        network[1].requires_grad_(True)
        loss(network, 2 * X).backward()

    assert pair(step)


def test_a_layer_that_is_frozen_when_the_watching_begins_may_train_later():
    pair = Pair()
    pair.layer.requires_grad_(False)

    def step(network):
        network[1].requires_grad_(True)
        loss(network).backward()

    assert pair(step)


def test_gradients_that_are_thrown_away_do_not_count():
    def step(network):
        loss(network).backward()
        network.zero_grad()
        loss(network, 2 * X).backward()

    assert Pair()(step)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_may_be_computed_again_in_the_backward_pass(reentrant):
    """Also one that is called outside, too: the passes then run within each other."""

    def step(network):
        x = X.clone().requires_grad_()
        torch.autograd.grad(loss(network, x), x)
        again = checkpoint(lambda x: network[2](network[1](x)), network[1](x), use_reentrant=reentrant)
        network[-1](again).square().sum().backward()

    assert Pair()(step)


def test_no_hook_is_left():
    pair = Pair()
    pair(lambda network: loss(network).backward())
    values = pair.layer.values
    assert not pair.layer._forward_hooks
    assert not values._backward_hooks
    assert not values._post_accumulate_grad_hooks


class Adversarial(Lit):
    """Trains on examples that a first backward pass has made worse."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(super().training_step((x, batch[1]), batch_idx), x)
        return super().training_step(((x + 0.1 * slope.sign()).detach(), batch[1]), batch_idx)


class Two(Lit):
    """Both halves have an optimizer, and a pass for the first goes through the second, whose gradients it drops."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def configure_optimizers(self):
        halves = self.net[:2], self.net[2:]
        return [torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9) for half in halves]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize("kind", [Adversarial, Two])
def test_training_with_other_backward_passes_is_that_with_masks(kind, monkeypatch):
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))
    runs = []
    for storage in ("masked", "sparse"):
        callback, module = RigL(0.8, update_every=7, seed=3, storage=storage), seeded(lambda: kind(mlp(torch.float64)))
        fit(callback, module, loader(dtype=torch.float64), precision="64-true")
        runs.append((callback.masks, module.state_dict()))
    (masks, theirs), (found, ours) = runs
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())
    assert all(torch.allclose(x, ours[name], rtol=0, atol=1e-12) for name, x in theirs.items())


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_candidates_are_the_inactive_that_reach_a_bound(kind, calls, monkeypatch):
    """Some rows at a time, also where the next ones take the place of those before."""
    monkeypatch.setattr("lightning_sparse.weights.captured._CHUNK", 200)
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        layer, x, y = SparseLinear(20, 7, nnz=30, generator=generator), (5, 20), (5, 7)
    else:
        layer, x, y = SparseConv2d(6, 4, 3, nnz=30, groups=2, generator=generator), (5, 6, 5, 5), (5, 4, 3, 3)
    weight = SparseWeight("weight", layer.shape, layer)
    weight.gradient.listen(lambda gradient: gradient)
    weight.gradient.calls = [tuple(torch.randn(s, generator=generator) for s in (x, y)) for _ in range(calls)]
    whole = torch.cat([scores for _, scores in weight.gradient.inactive(layer, layer.positions)])
    assert (whole[layer.positions] == -1).all()
    for bound in 0.0, 2.0:
        parts = [part(bound) for part in weight.gradient.candidates(layer, layer.positions)]
        assert len(parts) > 1
        found, magnitudes = (torch.cat(each) for each in zip(*parts, strict=True))
        assert found.tolist() == (whole >= bound).nonzero().squeeze(1).tolist()
        assert torch.equal(magnitudes, whole[found])
