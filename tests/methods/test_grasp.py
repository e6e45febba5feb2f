"""GraSP: its score as the whole Hessian has it, and what it asks of a module."""

import copy
import itertools

import pytest
import torch
from helpers import Lit, fit, loader, mlp, same, seeded
from scored import double, largest, mean_loss, pruned, weights_of
from torch import nn

from lightning_sparse import GraSP
from lightning_sparse.rules.budgets import budget


def flow(module, W, batches, temperature):
    """The squared norm of the gradient."""
    loss = mean_loss(module, W, batches, temperature)
    return sum(dP.square().sum() for dP in torch.autograd.grad(loss, list(W.values()), create_graph=True))


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("temperature", "batches"), [(1.0, 1), (200.0, 2)])
def test_grasp_keeps_what_its_whole_hessian_says(absolute, temperature, batches):
    net = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    torch.manual_seed(3)
    module = Lit(net)
    W, drawn = weights_of(module), list(itertools.islice(loader(dtype=torch.float64), batches))
    flat, shapes = torch.cat([w.flatten() for w in W.values()]), [w.shape for w in W.values()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return mean_loss(module, dict(zip(W, map(torch.Tensor.view, parts, shapes), strict=True)), drawn, temperature)

    H, g = torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat)
    S = -flat * torch.tensor([sum(H[q, p] * g[p] for p in range(len(g))) for q in range(len(g))])
    kept = S.abs() if absolute else -S
    parts = kept.split([shape.numel() for shape in shapes])
    expected = largest(dict(zip(W, map(torch.Tensor.view, parts, shapes), strict=True)), budget(0.7, len(flat)))
    callback = GraSP(0.7, batches=batches, absolute=absolute, temperature=temperature)
    assert same(pruned(callback, module, loader(dtype=torch.float64)), expected)


def test_grasp_drops_the_weights_whose_shrinking_raises_the_gradients_norm_most():
    """The sign, by finite differences: S is half the change of the flow per share that is taken off a weight."""
    module = double()
    W, drawn = weights_of(module), list(itertools.islice(loader(dtype=torch.float64), 1))
    masks = pruned(GraSP(0.1, temperature=1.0), copy.deepcopy(module), loader(dtype=torch.float64))
    W = {name: w.requires_grad_() for name, w in W.items()}
    before, changes = flow(module, W, drawn, 1.0), {}
    for name, w in W.items():
        changes[name] = torch.zeros_like(w)
        for q in range(w.numel()):
            with torch.no_grad():
                value = w.view(-1)[q].item()
                w.view(-1)[q] *= 1 - 1e-6
            changes[name].view(-1)[q] = (flow(module, W, drawn, 1.0) - before).item()
            with torch.no_grad():
                w.view(-1)[q] = value
    kept = torch.cat([changes[name][mask] for name, mask in masks.items()])
    dropped = torch.cat([changes[name][~mask] for name, mask in masks.items()])
    assert dropped.min() > 0
    assert kept.max() <= dropped.min() + 1e-12


# ---------------------------------------------------------------------- no trace


def test_dropout_is_the_same_in_both_passes_of_grasp(monkeypatch):
    """So g and H are those of one function."""
    from lightning_sparse.trainer.probe import Probe

    known, losses = [], Probe.losses

    def noted(self, count):
        known.append([])
        for loss in losses(self, count):
            known[-1].append(loss.item())
            yield loss

    monkeypatch.setattr(Probe, "losses", noted)
    pruned(GraSP(0.5, batches=3), seeded(lambda: Lit(nn.Sequential(mlp(), nn.Dropout(0.5)))))
    assert len(known) == 2
    assert known[0] == known[1]
    assert len(set(known[0])) == 3


# ---------------------------------------------------------------------- modules


def test_grasp_finds_logits_by_name():
    class Inner(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    assert same(pruned(GraSP(0.8, logits="net"), seeded(Inner)), pruned(GraSP(0.8), seeded(Lit)))
    with pytest.raises(Exception, match=r"training_step never calls the module's forward.*logits='net.head'"):
        fit(GraSP(0.8), seeded(Inner))
    with pytest.raises(Exception, match=r"logits='head' names no submodule of Inner.*'net.4'"):
        fit(GraSP(0.8, logits="head"), seeded(Inner))


# ---------------------------------------------------------------------- refusals


def test_outputs_that_are_no_tensors_cannot_be_tempered():
    class Pair(Lit):
        def forward(self, x):
            return super().forward(x), x

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    with pytest.raises(Exception, match=r"are of type tuple, no tensor\. Name the submodule"):
        fit(GraSP(0.9), seeded(Pair))
    assert same(pruned(GraSP(0.8, logits="net"), seeded(Pair)), pruned(GraSP(0.8), seeded(Lit)))


def test_operations_without_a_second_derivative_are_refused():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Once(Lit):
        def forward(self, x):
            return Square.apply(super().forward(x))

    with pytest.raises(Exception, match=r"GraSP.* needs second derivatives, which an operation of the module does not"):
        fit(GraSP(0.9), seeded(Once))
