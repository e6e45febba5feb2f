"""SRSTE and SSTE against autograd, by hand, and in a Trainer."""

import pytest
import torch
from helpers import PLAINLY, Lit, SavesFirst, Watch, cnn, fit, loader, mlp, same, seeded, trainer
from torch import nn
from torch.func import functional_call

from lightning_sparse import SRSTE, SSTE
from lightning_sparse.export.semi_structured import fits_2_4

METHODS = {"SRSTE": SRSTE, "SSTE": SSTE}


def in_groups(W, m):
    """The groups of a weight as the last dimension: inputs of linear layers, input channels of convolutions."""
    return W.movedim(1, -1).unflatten(-1, (-1, m))


def ungrouped(groups):
    return groups.flatten(-2).movedim(-1, 1)


class Refined(torch.autograd.Function):
    """``W`` without what is not among the n largest of m; the gradient has the decay of what is not."""

    @staticmethod
    def forward(ctx, W, n, m, decay):
        groups = in_groups(W.abs(), m)
        mask = ungrouped(groups >= groups.sort(-1, descending=True).values[..., n - 1 : n])
        ctx.save_for_backward(W, mask)
        ctx.decay = decay
        return W * mask

    @staticmethod
    def backward(ctx, dP):
        W, mask = ctx.saved_tensors
        return dP + ctx.decay * ~mask * W, None, None, None


class Smooth(torch.autograd.Function):
    """The soft threshold of each group, with a scale; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, W, n, m, beta):
        groups = in_groups(W, m)
        t = groups.abs().sort(-1, descending=True).values[..., n : n + 1]
        return beta * ungrouped(groups.sign() * (groups.abs() - t).clamp(min=0))

    @staticmethod
    def backward(ctx, dP):
        return dP, None, None, None


def reference(method, net, names, n, m, epochs, extra):
    """Train with everything in one graph; return the dense weights, what layers compute with, and the others."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    extras = dict.fromkeys(names, extra)
    if method is Smooth:
        for name in names:
            W, S = parameters[name].detach(), Smooth.apply(parameters[name].detach(), n, m, 1.0)
            extras[name] = float((W * S).sum() / (S * S).sum())

    def used():
        return {k: method.apply(p, n, m, extras[k]) if k in names else p for k, p in parameters.items()}

    for _ in range(epochs):
        for x, y in loader(48, dtype=torch.float64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(functional_call(net, used(), (x,)), y).backward()
            optimizer.step()
    return parameters, used()


@pytest.mark.parametrize(
    ("method", "net", "pattern", "names"),
    [
        ("SRSTE", mlp, "2:4", ["0.weight", "2.weight"]),
        ("SRSTE", cnn, "1:3", ["4.weight", "8.weight"]),
        ("SSTE", mlp, "2:4", ["0.weight", "2.weight"]),
        ("SSTE", cnn, "1:2", ["4.weight", "8.weight"]),
    ],
)
def test_training_equals_autograd_through_the_estimator(method, net, pattern, names):
    module = seeded(lambda: Lit(net(torch.float64), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))
    n, m = map(int, pattern.split(":"))
    options = {"lambda_w": 0.05, "scale_init": False} if method == "SRSTE" else {}
    function = Refined if method == "SRSTE" else Smooth
    latents, used = reference(function, net(torch.float64).double() and module.net, names, n, m, 2, 0.05)
    callback = METHODS[method](pattern, **options)
    watch = Watch(callback)
    fit([callback, watch], module, loader(48, dtype=torch.float64))
    assert [f"net.{name}" for name in names] == list(callback.masks)
    assert watch.moves, "the test would prove nothing of the sets"
    for name, W in latents.items():
        assert torch.allclose(module.get_parameter(f"net.{name}"), used[name], atol=1e-12), name
        if name in names:
            assert torch.allclose(callback.latents[f"net.{name}"], W, atol=1e-12)
            assert (in_groups(callback.masks[f"net.{name}"], m).sum(-1) == n).all()


class First(Lit):
    def training_step(self, batch, batch_idx):
        return self.net.weight[0, 0]


def test_a_step_by_hand():
    W = [[0.5, -0.4, 0.1, 0.3]]
    used = {}
    for name, method in METHODS.items():
        module = First(nn.Linear(4, 1, bias=False), lambda p: torch.optim.SGD(p, lr=0.5))
        module.net.weight.data = torch.tensor(W)
        options = {"scale_init": False, "lambda_w": 0.2} if name == "SRSTE" else {}
        callback = method("2:4", **options)
        fit(callback, module, loader(8), max_epochs=1)
        used[name] = module.net.weight.detach(), callback.latents["net.weight"]
    # dP = (1, 0, 0, 0); SR-STE: W - 0.5 (dP + 0.2 (0, 0, 0.1, 0.3)) = (0, -0.4, 0.09, 0.27)
    P, latent = used["SRSTE"]
    assert torch.allclose(latent, torch.tensor([[0.0, -0.4, 0.09, 0.27]]))
    assert torch.allclose(P, torch.tensor([[0.0, -0.4, 0.0, 0.27]]))
    # S-STE: t = 0.3, S = (0.2, -0.1, 0, 0), beta = (0.1 + 0.04) / 0.05 = 2.8; then W = (0, -0.4, 0.1, 0.3), t = 0.1
    P, latent = used["SSTE"]
    assert torch.allclose(latent, torch.tensor([[0.0, -0.4, 0.1, 0.3]]))
    assert torch.allclose(P, 2.8 * torch.tensor([[0.0, -0.3, 0.0, 0.2]]))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_if_never_stopped(method, tmp_path):
    path = tmp_path / "first.ckpt"
    adam = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.02)}
    whole, _ = fit([METHODS[method](), SavesFirst(path)], seeded(lambda: Lit(**adam)), loader(64))
    again, callback = seeded(lambda: Lit(**adam), seed=5), METHODS[method]()
    trainer(callback).fit(again, loader(64), ckpt_path=path, **PLAINLY)
    assert same(dict(whole.state_dict()), dict(again.state_dict()))
    assert fits_2_4(again.net[0].weight)
    with pytest.raises(Exception, match="was written"):
        trainer(METHODS[method]("1:2")).fit(seeded(Lit), loader(64), ckpt_path=path, **PLAINLY)


def test_gradients_of_several_batches_decay_once():
    results = []
    for batch, accumulate in ((8, 2), (16, 1)):
        module = seeded(lambda: Lit(mlp(torch.float64), lambda p: torch.optim.SGD(p, lr=0.1)))
        fit(SRSTE(lambda_w=0.1), module, loader(64, batch, torch.float64), accumulate_grad_batches=accumulate)
        results.append(module.net[0].weight)
    assert torch.allclose(*results, atol=1e-12)


def test_transposable_weights_are_2_4_in_both_directions():
    callback = SRSTE(transposable=True)
    module = seeded(lambda: Lit(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))))
    fit(callback, module, loader(32), max_epochs=1)
    for name in ("net.0.weight", "net.2.weight"):
        W = module.get_parameter(name)
        assert fits_2_4(W)
        assert fits_2_4(W.T)
    assert callback.sparsity == 0.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SRSTE("block:2x2"), 'pattern must be "N:M" with N below M, such as "2:4"'),
        (lambda: SRSTE("1:8", transposable=True), "transposable needs M = 4, got pattern='1:8'"),
        (lambda: SRSTE(lambda_w=-1.0), "lambda_w must be a finite number of at least 0"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_layers_that_do_not_divide_stay_dense():
    callback = SRSTE(transposable=True)
    fit(callback, seeded(Lit), loader(8), max_epochs=1)
    assert list(callback.masks) == ["net.0.weight"]  # of 16 x 12, 10 x 16, 4 x 10
