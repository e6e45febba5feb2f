"""SWAT against an independent reference in autograd, its limits, and a module without a trace of it."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from helpers import Lit, cnn, data, fit, loader, mlp, seeded, trainer
from torch import nn
from torch.func import functional_call

from lightning_sparse import SWAT
from lightning_sparse.layers.activations import SparseInput, largest
from lightning_sparse.rules.ties import spread


def first(x, k):
    """1 at the k largest magnitudes, of equals the first in the order of ties, by sorting in Python."""
    values = x.detach().abs().flatten().tolist()
    mask = torch.zeros(len(values), dtype=x.dtype)
    order = spread(torch.arange(len(values)), x.shape).tolist()
    mask[sorted(range(len(values)), key=lambda i: (-values[i], order[i]))[:k]] = 1
    return mask.view_as(x)


class Through(torch.autograd.Function):
    """``W * mask``, whose gradient passes to all of W."""

    @staticmethod
    def forward(ctx, W, mask):
        return W * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Sparse(nn.Module):
    """A layer in two halves: the value and the input's gradient from the whole input, the weight's from the largest."""

    def __init__(self, layer, density):
        super().__init__()
        self.layer, self.density = layer, density

    def forward(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        top = (x * first(x, x.numel() - round((1 - self.density) * x.numel()))).detach()

        def run(W, b, value):
            return functional_call(self.layer, {"weight": W, "bias": b}, (value,))

        of_input = run(weight.detach(), bias, x)
        of_weight = run(weight, bias.detach(), top)
        return of_input + (of_weight - of_weight.detach())  # + 0 exactly: equal values stay equal


def reference(net, sparsity, activation_sparsity, accumulate, epochs):
    """Train with everything in one graph; return the dense weights, masks and the other parameters."""
    W = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if p.ndim > 1}
    rest = {name: p for name, p in net.named_parameters() if p.ndim == 1}
    for i, layer in enumerate(net):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            net[i] = Sparse(layer, 1 - activation_sparsity)
    optimizer = torch.optim.SGD([*W.values(), *rest.values()], lr=0.1, momentum=0.9, weight_decay=1e-3)
    x, y = data(240, torch.float64)

    def masks():
        sizes = [w.numel() for w in W.values()]
        total = sum(sizes) - round(sparsity * sum(sizes))
        exact = [total * size / sum(sizes) for size in sizes]
        counts = [int(e) for e in exact]
        for i in sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))[: total - sum(counts)]:
            counts[i] += 1
        return {name: first(w, k) for (name, w), k in zip(W.items(), counts, strict=True)}

    for _ in range(epochs):
        optimizer.zero_grad()
        for i in range(30):
            batch = slice(8 * i, 8 * i + 8)
            chosen = masks()
            inner = {n.replace(".", ".layer.", 1): Through.apply(w, chosen[n]) for n, w in W.items()}
            inner |= {n if isinstance(net[int(n[0])], nn.BatchNorm2d) else n.replace(".", ".layer.", 1): p
                      for n, p in rest.items()}  # fmt: skip
            loss = nn.functional.cross_entropy(functional_call(net, inner, x[batch]), y[batch])
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i == 29:
                optimizer.step()
                optimizer.zero_grad()
    return W, masks(), rest


@pytest.mark.parametrize(("net", "accumulate", "epochs"), [(mlp, 1, 2), (cnn, 4, 3)])
def test_trains_as_the_autograd_reference(net, accumulate, epochs):
    W, masks, rest = reference(seeded(lambda: net(torch.float64)), 0.7, 0.6, accumulate, epochs)
    callback = SWAT(0.7, activation_sparsity=0.6, scale_init=False)
    module = Lit(seeded(lambda: net(torch.float64)))
    trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate).fit(module, loader(dtype=torch.float64))
    start = dict(seeded(lambda: net(torch.float64)).named_parameters())
    for name, w in W.items():
        assert (callback.latents[f"net.{name}"] - w.detach()).abs().max() <= 1e-5 * w.detach().abs().max()
        assert torch.equal(callback.masks[f"net.{name}"], masks[name] != 0)
        assert not torch.equal(masks[name], first(start[name], int(masks[name].sum()))) or accumulate > 1
    for name, p in rest.items():
        assert torch.allclose(module.net.get_parameter(name), p, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("hooked", [False, True])
def test_all_weights_and_activations_are_dense_training_to_the_last_bit(hooked):
    """With hooks, too: 1e-9 of an input of some hundred values is none of them."""
    callback = SWAT(0.0, activation_sparsity=1e-9 if hooked else 0.0)
    module, _ = fit(callback, seeded(lambda: Lit(cnn())))
    dense, _ = fit([], seeded(lambda: Lit(cnn())))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), dense.parameters(), strict=True))


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 3), (5, 6)),
    "Linear 3d": (lambda: nn.Linear(6, 3), (2, 4, 6)),
    "Linear 3d without bias": (lambda: nn.Linear(6, 3, bias=False), (2, 4, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("layout", ["plain", "slice", "transposed", "channels_last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_as_ever_but_for_the_gradient_of_its_weight(kind, layout):
    build, shape = LAYERS[kind]
    layer = seeded(build)
    x = torch.randn(shape)
    if layout == "slice":
        x = torch.cat((x, x))[len(x) :]
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "channels_last":
        if x.ndim != 4:
            pytest.skip("four dimensions")
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    top = largest(x, 0.6)
    assert int(top.count_nonzero()) == x.numel() - round(0.6 * x.numel())
    direction = torch.randn_like(layer(x))

    def run(value):
        value = value.detach().requires_grad_()
        layer.zero_grad()
        y = layer(value)
        (y * direction).sum().backward()
        return y, value.grad, layer.weight.grad.clone()

    y, dx, _ = run(x)
    _, _, dW = run(top)
    handles = SparseInput(0.6).register(layer)
    results = run(x)
    for mine, theirs in zip(results, (y, dx, dW), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_under_autocast_the_input_is_still_found():
    layer = seeded(lambda: nn.Linear(6, 6))
    x = torch.randn(6, 6)
    handles = SparseInput(0.5).register(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    for handle in handles:
        handle.remove()
    expected = largest(x.bfloat16(), 0.5).float().sum(0)
    assert torch.allclose(layer.weight.grad, expected.expand(6, 6), rtol=0.02, atol=0.02)


def test_a_layer_that_fails_leaves_no_hooks_open():
    layer = nn.Linear(6, 3)
    SparseInput(0.5).register(layer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, 5))
    x = torch.randn(4, 3, requires_grad=True)
    y = x.exp()
    assert y.grad_fn._saved_result is not None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


def test_no_trace_is_left_after_fit_and_copies_work_during_it():
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert pl_module.net[0]._forward_hooks
            self.twin = pickle.loads(pickle.dumps(copy.deepcopy(pl_module.net)))

    copies = Copies()
    module, _ = fit([SWAT(0.8), copies], max_epochs=1)
    for layer in module.modules():
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
    assert torch.equal(copies.twin(torch.ones(1, 12)), module.net(torch.ones(1, 12)))


def test_counts_are_exact_and_the_work_of_gradients_is_told():
    callback = SWAT(0.77, activation_sparsity=0.5, distribution="erk")
    fit(callback)
    assert sum(int(m.sum()) for m in callback.masks.values()) == 392 - round(0.77 * 392)
    assert callback.gradient_density == 0.5
    assert callback.extra_metrics == {"sparsity/backward": 0.5}
    assert SWAT(0.9)._left_out == 0.9


def test_layers_that_do_not_read_one_input_plainly_have_sparse_weights_alone():
    """A convolution that pads its input otherwise than with zeros, and a recurrent layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
            self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.rnn(self.conv(x.view(-1, 2, 6)).mT)[0][:, -1])

    callback = SWAT(0.5, activation_sparsity=0.75)
    fit(callback, seeded(lambda: Lit(Net())), max_epochs=1)
    dense = {name for name, share in callback.layer_gradient_density.items() if share == 1}
    assert dense == {"net.conv.weight", "net.rnn.weight_ih_l0", "net.rnn.weight_hh_l0"}
    assert callback.layer_gradient_density["net.head.weight"] == 0.25


def test_inputs_that_are_copied_before_they_are_read_are_not_told_as_sparse():
    """Attention's output projection is never called, and torch pads a copy for even kernels with padding="same"."""
    assert not SparseInput.suits(nn.MultiheadAttention(4, 2).out_proj)
    assert [SparseInput.suits(nn.Conv2d(2, 2, k, padding="same")) for k in (1, 2, 3, (3, 4))] == [
        True,
        False,
        True,
        False,
    ]
    assert SparseInput.suits(nn.Conv1d(2, 2, 2, dilation=2, padding="same"))
    assert SparseInput.suits(nn.Conv1d(2, 2, 2, padding=1))


@pytest.mark.parametrize("value", [-0.1, 1.1, "x"])
def test_bad_arguments_are_refused(value):
    with pytest.raises(ValueError, match=r"^activation_sparsity must be a number from 0 to 1, got"):
        SWAT(0.8, activation_sparsity=value)
