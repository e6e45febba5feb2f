"""Training with operators for 2:4 weights, emulated on the CPU: what they are given, and what comes of it."""

import copy
import math
import pickle

import pytest
import torch
from helpers import Lit, fit, loader, seeded, trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sparse import SRSTE, SSTE
from lightning_sparse.kernels import semi_structured as kernels
from lightning_sparse.layers.semi_structured import linear_2_4
from lightning_sparse.rules.matrices import FIRST
from lightning_sparse.rules.transposable import largest_tiles


class Emulated:
    """A product that knows of a weight only two of every four neighbours, and where they were."""

    def __init__(self):
        self.shapes = []

    def __call__(self, x, W, bias=None):
        assert x.is_contiguous()
        assert W.is_contiguous()
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(W.shape))
        groups = W.reshape(-1, 4)
        places = groups.abs().topk(2).indices
        kept = torch.zeros_like(groups).scatter_(1, places, groups.gather(1, places))
        return nn.functional.linear(x, kept.view(W.shape), bias)


@pytest.fixture
def operator(monkeypatch):
    """The operator, on a CPU that stands in for a GPU, where all layers and dtypes are taken."""
    emulated = Emulated()
    monkeypatch.setattr(kernels, "linear", emulated)
    monkeypatch.setattr(kernels, "capability", lambda device: (8, 0))
    monkeypatch.setattr(kernels, "PAYS", 32)
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32, torch.float64, torch.bfloat16))
    return emulated


def three_layers(dtype=torch.float64):
    layers = nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    return nn.Sequential(*layers).to(dtype)


def made(net=three_layers):
    return seeded(lambda: Lit(net(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))


# ---------------------------------------------------------------------- which operator

SIZES = {
    (4096, 4096): None,
    (1024, 4096): None,
    (4096, 1056): "outputs are no multiple of 32, or inputs none of 64",
    (1000, 1024): "outputs are no multiple of 32, or inputs none of 64",
    (4096, 512): "too small to gain: a side is below 1024",
}


@pytest.mark.parametrize("shape", SIZES)
def test_products_are_dense_for_shapes_that_torch_does_not_take_or_that_are_small(shape):
    assert kernels.why_dense(shape, torch.bfloat16, (9, 0)) == SIZES[shape]


def test_products_are_dense_without_a_gpu_and_a_dtype_that_have_operators():
    shape = 4096, 4096
    assert kernels.why_dense(shape, torch.float16, (8, 0), both=True) is None
    assert kernels.why_dense(shape, torch.float16, None) == "not on an NVIDIA GPU"
    assert kernels.why_dense(shape, torch.float16, (7, 5)) == "on a GPU of compute capability 7.5, below 8.0"
    assert kernels.why_dense(shape, torch.float32, (8, 0)) == 'computed in float32: give precision="bf16-mixed"'
    assert kernels.why_dense((1056, 1024), torch.float16, (8, 0)) is None
    assert "no multiple of 64" in kernels.why_dense((1056, 1024), torch.float16, (8, 0), both=True)
    assert kernels.capability(torch.device("cpu")) is None


# ---------------------------------------------------------------------- products


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_a_dense_layer_to_the_last_bit(operator, bias, both):
    torch.manual_seed(0)
    W, x, dy, b = (torch.randint(-9, 10, shape).double() for shape in ((8, 12), (2, 3, 12), (2, 3, 8), (8,)))
    W, b = W * largest_tiles(W.abs(), FIRST, 2), b if bias else None  # whole numbers, whose sums are exact in any order
    results = []
    for function in (lambda x, W, b: linear_2_4(x, W, b, both), nn.functional.linear):
        leaves = [each.clone().requires_grad_() for each in (x, W, b) if each is not None]
        y = function(*leaves, *[None] * (3 - len(leaves)))
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(ours, dense) for ours, dense in zip(*results, strict=True))
    assert operator.shapes == [(8, 12), (12, 8)] if both else [(8, 12)]


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="its fake tensors run ~ on a GPU")
def test_torch_takes_what_it_is_given(monkeypatch):
    """With tensors that have a GPU's dispatch and no values, which one of torch's two libraries takes."""
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    with FakeTensorMode(), torch.no_grad():
        x, W, b = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((10, 128), (64, 128), 64))
        for y in (kernels.linear(x, W), kernels.linear(x, W, b)):
            assert y.shape == (10, 64)
            assert y.dtype == torch.bfloat16
            assert y.device.type == "cuda"


# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize(
    ("method", "options", "products"),
    [
        (SRSTE, {"transposable": True}, {"forward": 1, "backward": 1}),
        (SRSTE, {"update_every": 2}, {"forward": 1}),
        (SSTE, {}, {"forward": 1}),
    ],
)
def test_training_is_that_of_dense_products_and_layers_are_plain_afterwards(operator, method, options, products):
    plain, _ = fit(method(**options), made(), loader(32, dtype=torch.float64))
    callback = method(semi_structured=True, **options)
    with pytest.warns(UserWarning, match=r"products are dense: net\.0\.weight, net\.4\.weight \(") as told:
        module, run = fit(callback, made(), loader(32, dtype=torch.float64))
    assert sum("gains nothing of semi_structured" in str(each.message) for each in told) == 1
    assert operator.shapes == [(64, 64)] * (run.global_step * sum(products.values()))
    for ours, dense in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, dense, atol=1e-12)
    assert [type(layer) for layer in module.net[::2]] == [nn.Linear] * 3
    assert {*vars(module.net[2])} == {*vars(nn.Linear(1, 1))}


def test_autocast_chooses_the_dtype(operator, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "linear", lambda x, W, b=None: (seen.append((x.dtype, W.dtype)), operator(x, W, b))[1])
    module, _ = fit(
        SRSTE(semi_structured=True), made(lambda: three_layers(torch.float32)), loader(8), precision="bf16-mixed"
    )
    assert {*seen} == {(torch.bfloat16, torch.bfloat16)}
    assert module.net[2].weight.dtype == torch.float32


class WritesOnce(Lit):
    """Writes into a weight before a batch, which is not 2:4 then; validates; keeps copies."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            with torch.no_grad():
                self.net[2].weight.add_(1.0)

    def validation_step(self, batch, batch_idx):
        return self.net(batch[0])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.copies = copy.deepcopy(self.net[2]), pickle.loads(pickle.dumps(self.net[2]))


def test_weights_that_may_not_be_2_4_are_multiplied_by_as_they_are(operator):
    module = seeded(lambda: WritesOnce(three_layers(), lambda p: torch.optim.SGD(p, lr=0.1)))
    data = loader(24, dtype=torch.float64)
    trainer(SRSTE(semi_structured=True), max_epochs=1).fit(module, data, data)
    assert len(operator.shapes) == 2, "of three steps; validation is dense"
    for copied in module.copies:
        copied(torch.ones(1, 64, dtype=torch.float64))
    assert len(operator.shapes) == 2


def test_layers_are_plain_after_an_exception(operator):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    module = seeded(lambda: Fails(three_layers()))
    with pytest.raises(ZeroDivisionError):
        fit(SRSTE(semi_structured=True), module, loader(8, dtype=torch.float64))
    assert operator.shapes == [(64, 64)]
    assert type(module.net[2]) is nn.Linear


def test_without_a_gpu_training_is_dense_to_the_last_bit_and_the_weights_are_named():
    names = r"net\.0\.weight, net\.2\.weight"  # of 16 x 12 and 10 x 16; 10 inputs have no pattern
    with pytest.warns(UserWarning, match=rf"where products are dense: {names} \(not on an NVIDIA GPU\)\.$"):
        module, _ = fit(SRSTE(semi_structured=True), train=loader(8))
    plain, _ = fit(SRSTE(), train=loader(8))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_other_patterns_are_refused():
    assert SRSTE("1:4", semi_structured=True).semi_structured
    for pattern in ("3:4", "2:8"):
        with pytest.raises(ValueError, match=rf'semi_structured needs pattern="2:4" or "1:4", got .{pattern}'):
            SSTE(pattern, semi_structured=True)
    assert math.isclose(SRSTE(semi_structured=True).sparsity_target, 0.5)
