import functools
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import effective, trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DST, AutoSparse, RigL
from lightning_sparse.accounting.flops import OTHER, dense_flops, inference
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.zoo import models
from lightning_sparse.zoo.models import (
    VGG16,
    MobileNetV1,
    MobileNetV2,
    ResNet18,
    ResNet50,
    ResNet56,
    Transformer,
    VGG16ImageNet,
    WideResNet,
)

WMT = functools.partial(Transformer, vocabulary=37000)
TINY = functools.partial(Transformer, vocabulary=11, width=8, layers=2, heads=2, hidden=12, dropout=0.0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def meta(build):
    with torch.device("meta"):
        return build()


def label(value):
    if isinstance(value, functools.partial):
        return "-".join([value.func.__name__, *map(str, value.args), *map(str, value.keywords.values())])
    return getattr(value, "__name__", None)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def millions(module, digits):
    return round(parameters(module) / 1e6, digits)


# ---------------------------------------------------------------------- counts in print


@pytest.mark.parametrize(
    ("build", "printed", "digits"),
    [
        (VGG16, 15.0, 1),  # the weights of DST's program; 15.0 at width 4.0 in memory-efficient DST, Table 2
        (functools.partial(VGG16, 100, 0.25), 0.95, 2),  # "0.9M" at width 1.0 in the same table
        (VGG16ImageNet, 138, 0),  # GGR, Section 5: "VGG16 network with 138M parameters"
        (functools.partial(VGG16ImageNet, 200, 64, 4), 58.8, 1),  # "58.8M parameters for Tiny-ImageNet"
        (functools.partial(ResNet18, 100), 11, 0),  # DFBST, Table 4: 11 (GGR says 22.4M, see docs/models.md)
        (functools.partial(ResNet18, 1000, "imagenet"), 11.7, 1),  # torchvision: 11,689,512
        (ResNet50, 25.56, 2),  # DST, Section 4.1: "25.56 M"
        (ResNet56, 0.85, 2),  # He et al., 2016, Table 6: 0.85M
        (functools.partial(WideResNet, 16, 8), 11.0, 1),  # Zagoruyko and Komodakis, 2016: 11.0M
        (functools.partial(WideResNet, 16, 10), 17.1, 1),  # 17.1M
        (functools.partial(WideResNet, 28, 8), 23.4, 1),  # DST prints none; the formula below is exact
        (MobileNetV1, 4.2, 1),  # Howard et al., 2017, Table 4: 4.2; STR's authors: 4.21M
        (MobileNetV2, 3.5, 1),  # torchvision: 3,504,872. Sandler et al., 2018, Table 4: 3.4 (GGR says 7.4M)
        # Vaswani et al., 2017, Table 3 has 65 for "about 37000" tokens: 44.1 M in the layers, so about 40,700 tokens
        (WMT, 63.1, 1),
    ],
    ids=label,
)
def test_networks_have_the_parameters_in_print(build, printed, digits):
    assert millions(meta(build), digits) == printed


@pytest.mark.parametrize(
    ("build", "printed"),
    [
        # Memory-efficient DST, Table 2. At width 3.0 the paper has 8.4M, less than the 8.46 M of these weights; all
        # others agree, which they do not without the hidden linear layer.
        (VGG16, {1.0: 0.9, 1.5: 2.1, 2.0: 3.8, 2.5: 5.9, 3.0: 8.5, 3.5: 11.5, 4.0: 15.0}),
        # At width 3.0 the paper has 7.6M, less than the 7.65 M of these weights; all others agree.
        (ResNet56, {1.0: 0.9, 1.5: 1.9, 2.0: 3.4, 2.5: 5.3, 3.0: 7.7, 3.5: 10.4, 4.0: 13.6}),
    ],
    ids=["vgg16", "resnet56"],
)
def test_wider_networks_have_the_weights_in_print(build, printed):
    unit = 0.25 if build is VGG16 else 1.0
    found = {}
    for width in printed:
        module = meta(lambda width=width: build(100, unit * width))
        found[width] = round(sum(p.numel() for p in module.parameters() if p.ndim > 1) / 1e6, 1)
    assert found == printed


@pytest.mark.parametrize(("depth", "widen"), [(16, 8), (16, 10), (28, 8)])
def test_wide_residual_networks_have_the_weights_of_their_formula(depth, widen):
    blocks, expected, before = (depth - 4) // 6, 9 * 3 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        expected += before * width + 9 * before * width + (2 * blocks - 1) * 9 * width**2
        before = width
    expected += 10 * before
    module = meta(lambda: WideResNet(depth, widen))
    assert sum(p.numel() for p in module.parameters() if p.ndim > 1) == expected


@pytest.mark.parametrize(
    ("build", "size", "millions"),
    [
        (ResNet50, 224, 4089),  # STR's authors: 4.09G
        (VGG16ImageNet, 224, 15470),  # torchvision: 15.47 G
        (MobileNetV1, 224, 569),  # Howard et al., 2017, Table 4: 569 million; STR's authors: 569M
        (MobileNetV2, 224, 301),  # Sandler et al., 2018, Table 4: 300M
    ],
    ids=label,
)
def test_multiplications_on_imagenet_are_the_ones_in_print(build, size, millions):
    module = meta(build)
    x = torch.empty(1, 3, size, size, device="meta")
    module.eval()
    flops = dense_flops(module, lambda: module(x).sum())
    assert OTHER not in flops
    assert round(inference(flops, {}) / 2e6) == millions


DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.skipif(not DOCS.exists(), reason="docs are not installed")
def test_the_table_in_the_docs_is_what_the_networks_have():
    row = re.compile(r"\| `(\w+\(.*\))` \| ([\d,]+) \| (\d+): ([\d,]+) \| (?:([\d,.]+) at (\d+) x \d+)?")
    rows = [match.groups() for line in DOCS.read_text().splitlines() if (match := row.match(line))]
    assert len(rows) == 20
    for call, total, layers, weights, products, size in rows:
        module = meta(lambda call=call: eval(call, vars(models)))
        sparse = [choice.parameter.numel() for choice in select_parameters(module) if choice.reason is None]
        assert (call, f"{parameters(module):,}") == (call, total)
        assert (call, str(len(sparse)), f"{sum(sparse):,}") == (call, layers, weights)
        if size:
            x = torch.empty(1, 1 if size == "28" else 3, int(size), int(size), device="meta")
            flops = dense_flops(module.eval(), lambda module=module, x=x: module(x).sum())
            assert (call, f"{inference(flops, {}) / 2e6:,.1f}") == (call, products)


# ---------------------------------------------------------------------- what is made sparse


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (VGG16, 13 + 2),
        (VGG16ImageNet, 13 + 3),
        (functools.partial(VGG16ImageNet, 200, 64, 4), 10 + 3),
        (functools.partial(VGG16ImageNet, batch_norm=True), 13 + 3),
        (ResNet18, 17 + 3 + 1),  # 3 shortcuts with a convolution
        (ResNet50, 49 + 4 + 1),
        (ResNet56, 55 + 1),  # shortcuts without parameters
        (functools.partial(WideResNet, 28, 8), 25 + 3 + 1),
        (MobileNetV1, 1 + 2 * 13 + 1),
        (MobileNetV2, 1 + 2 + 3 * 16 + 1 + 1),
    ],
    ids=label,
)
def test_every_convolution_and_linear_layer_is_made_sparse_and_nothing_else(build, count):
    module = meta(build)
    layers = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {choice.name for choice in select_parameters(module) if choice.reason is None} == layers
    assert len(layers) == count
    assert {c.reason for c in select_parameters(module)} == {None, "bias, norm or scalar"}


def test_of_the_transformer_all_weights_but_the_embedding_are_made_sparse():
    choices = {choice.name: choice.reason for choice in select_parameters(meta(WMT))}
    sparse = [name for name, reason in choices.items() if reason is None]
    assert len(sparse) == 6 * 4 + 6 * 6
    encoder = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    decoder = encoder | {"multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight"}
    assert {name.split(".", 3)[3] for name in sparse if name.startswith("encoder")} == encoder
    assert {name.split(".", 3)[3] for name in sparse if name.startswith("decoder")} == decoder
    assert choices["embedding.weight"] == "Embedding: only on request (include)"
    assert sum(p.numel() for n, p in meta(WMT).named_parameters() if n in sparse) == 6 * (12 + 16) * 512**2


# ---------------------------------------------------------------------- they run and learn


def batch(size, classes, count=2):
    return torch.randn(count, 3, size, size), torch.arange(count) % classes


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (functools.partial(VGG16, width=0.125), 32),
        (functools.partial(VGG16ImageNet, 10, 32, 5), 32),
        (ResNet18, 32),
        (functools.partial(ResNet18, 10, "imagenet"), 64),
        (functools.partial(ResNet50, 10), 64),
        (functools.partial(ResNet56, width=0.5), 32),
        (functools.partial(WideResNet, 16, 1), 32),
        (functools.partial(MobileNetV1, 10, 0.25), 64),
        (functools.partial(MobileNetV2, 10, 0.25, "cifar"), 32),
        (functools.partial(MobileNetV2, 10, 0.25), 64),
    ],
    ids=label,
)
def test_every_weight_gets_a_gradient(build, size):
    module = build()
    x, y = batch(size, 10)
    logits = module(x)
    assert logits.shape == (2, 10)
    cross_entropy(logits, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad.any() for p in module.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (ResNet18, 4),
        (functools.partial(MobileNetV2, stem="cifar"), 4),
        (MobileNetV2, 1),
        (functools.partial(ResNet18, stem="imagenet"), 1),
    ],
    ids=label,
)
def test_the_stem_settles_how_small_an_image_of_32_pixels_becomes(build, size):
    module = meta(build)
    last = [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]
    shapes = []
    last.register_forward_hook(lambda layer, args, out: shapes.append(out.shape[2:]))
    module(torch.empty(2, 3, 32, 32, device="meta"))
    assert shapes == [(size, size)]


def test_a_shortcut_without_parameters_strides_and_fills_up_with_zeros():
    block = ResNet56().blocks[9]
    nn.init.zeros_(block.bn2.weight)  # the shortcut alone
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_vgg16_begins_as_its_authors_have_it():
    module = VGG16(width=0.5)
    assert all((norm.weight == 0.5).all() for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))
    assert module.features[-4].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert module.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("callback", [DST(alpha=1e-3), RigL(sparsity=0.8, update_every=2)], ids=["DST", "RigL"])
def test_a_residual_network_trains_sparse(callback):
    x, y = batch(32, 10, 16)
    module = WideResNet(10, 1)
    run = trainer(callback, max_epochs=2)
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    assert len(callback.masks) == 1 + 3 * 2 + 2 + 1  # 2 shortcuts with a convolution
    assert effective(module, callback)


# ---------------------------------------------------------------------- the Transformer


def sentences(count=6, length=5):
    """Return sources and targets of uneven length: a target is its source, between ``begin`` and ``end``."""
    source = torch.randint(3, 11, (count, length))
    source[:, -1] = 2
    source[::2, -2], source[::2, -1] = 2, 0
    return source, torch.cat([torch.ones(count, 1, dtype=torch.long), source], 1)


def test_the_transformer_is_the_one_of_the_formulas():
    """Against plain arithmetic on its parameters, at inference and in training."""
    module = TINY(layers=1)
    source, target = sentences()
    w = dict(module.named_parameters())

    def attend(prefix, x, memory, hidden):
        weight, bias = w[f"{prefix}.in_proj_weight"], w[f"{prefix}.in_proj_bias"]
        q, k, v = (
            (y @ weight[i : i + 8].T + bias[i : i + 8]).unflatten(2, (2, 4)).transpose(1, 2)
            for i, y in ((0, x), (8, memory), (16, memory))
        )
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(hidden, -torch.inf)
        out = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
        return out @ w[f"{prefix}.out_proj.weight"].T + w[f"{prefix}.out_proj.bias"]

    def norm(prefix, x):
        centred = x - x.mean(2, keepdim=True)
        scale = (centred.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        return centred * scale * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]

    def feed(prefix, x):
        hidden = (x @ w[f"{prefix}.linear1.weight"].T + w[f"{prefix}.linear1.bias"]).relu()
        return hidden @ w[f"{prefix}.linear2.weight"].T + w[f"{prefix}.linear2.bias"]

    def embed(tokens):
        x = w["embedding.weight"][tokens] * 8**0.5
        for place in range(tokens.shape[1]):
            for i in range(4):
                angle = place / 10000 ** (2 * i / 8)
                x[:, place, 2 * i] += math.sin(angle)
                x[:, place, 2 * i + 1] += math.cos(angle)
        return x

    padded = (source == 0)[:, None, None]
    x = embed(source)
    p = "encoder.layers.0"
    x = norm(f"{p}.norm1", x + attend(f"{p}.self_attn", x, x, padded))
    memory = norm(f"{p}.norm2", x + feed(p, x))
    later = torch.ones(6, 6).triu(1).bool() | (target == 0)[:, None, None]
    y = embed(target)
    p = "decoder.layers.0"
    y = norm(f"{p}.norm1", y + attend(f"{p}.self_attn", y, y, later))
    y = norm(f"{p}.norm2", y + attend(f"{p}.multihead_attn", y, memory, padded))
    y = norm(f"{p}.norm3", y + feed(p, y))
    expected = y @ w["embedding.weight"].T
    assert torch.allclose(module(source, target), expected, atol=1e-5)
    with torch.no_grad():  # torch's own fast path
        assert torch.allclose(module.eval()(source, target), expected, atol=1e-5)


def test_every_weight_of_the_transformer_gets_a_gradient():
    module = TINY()
    module._loss(sentences(), 0.1)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad.any() for p in module.parameters() if p.ndim > 1)


def test_the_transformer_is_trained_as_in_autosparse():
    setup = meta(WMT).configure_optimizers()
    (group,) = setup["optimizer"].param_groups
    assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (0.000846, (0.9, 0.997), 0)
    assert setup["lr_scheduler"]["interval"] == "step"
    assert setup["lr_scheduler"]["scheduler"].warmup_steps == 4000
    assert meta(WMT).label_smoothing == 0.1


def test_padding_changes_nothing():
    module = TINY().eval()
    source, target = sentences(1, 4)
    more = [torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1) for tokens in (source, target)]
    assert torch.allclose(module(*more)[:, : target.shape[1]], module(source, target), atol=1e-5)
    assert torch.allclose(module._loss(tuple(more), 0.1)[0], module._loss((source, target), 0.1)[0], atol=1e-5)


def test_a_token_does_not_see_what_follows():
    module = TINY().eval()
    source, target = sentences()
    other = target.clone()
    other[:, 3:] = 5
    assert torch.allclose(module(source, target)[:, :3], module(source, other)[:, :3], atol=1e-6)


def test_the_loss_is_the_mean_over_tokens_smoothed_over_the_vocabulary():
    module = TINY()
    source, target = sentences()
    logs = module(source, target[:, :-1]).log_softmax(2)
    following = target[:, 1:]
    exact = -logs.gather(2, following[..., None])[..., 0]
    smoothed = 0.9 * exact - 0.1 * logs.mean(2)
    loss, _, count = module._loss((source, target), 0.1)
    assert count == (following != 0).sum()
    assert torch.allclose(loss, smoothed[following != 0].mean())


def test_translations_take_the_most_likely_token_up_to_the_end():
    module = TINY().eval()
    source, _ = sentences(24)
    module.end = int(module.translate(source, max_length=5)[0, 3])  # so that some end early
    out = module.translate(source, max_length=9)
    assert out.shape[1] <= 9
    assert (out[:, 0] == 1).all()
    ended = (out[:, :-1] == module.end).cumsum(1) > 0
    assert ended.any()
    assert torch.equal(out[:, 1:], module(source, out[:, :-1]).argmax(2).masked_fill(ended, 0))


def test_the_transformer_learns_to_copy_and_logs_its_metrics(tmp_path):
    data = DataLoader(TensorDataset(*sentences(64)), batch_size=8)
    module = TINY(
        width=16,
        layers=1,
        hidden=32,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3),
        lr_scheduler=None,
        label_smoothing=0.0,
    )
    callback = AutoSparse(alpha=0.4, init_threshold=-7.0, decay="exponential")
    run = trainer(callback, max_epochs=12)
    before = run.validate(module, data, verbose=False)[0]["val_loss"]
    run.fit(module, data, data)
    assert run.callback_metrics["val_loss"] < before / 2
    assert torch.allclose(run.callback_metrics["val_perplexity"].log(), run.callback_metrics["val_loss"])
    assert {"test_loss", "test_perplexity"} <= set(run.test(module, data, verbose=False)[0])
    assert run.predict(module, data)[0].shape[0] == 8
    assert "embedding.weight" not in callback.masks
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Transformer.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    source, target = sentences()
    assert torch.equal(loaded.eval()(source, target), module.eval()(source, target))


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VGG16(width=0), "width must be a finite number of at least 0.015625, got 0"),
        (lambda: VGG16ImageNet(blocks=6), "blocks must be at most 5, got 6"),
        (lambda: VGG16ImageNet(image_size=100), r"image_size must be a multiple of 2 \*\* blocks, 32, got 100"),
        (lambda: ResNet18(stem="mnist"), r"stem must be one of \['cifar', 'imagenet'\], got 'mnist'"),
        (lambda: WideResNet(depth=18), "depth must be 6 n [+] 4 .* got 18"),
        (lambda: MobileNetV1(width=0.01), "width must be a finite number of at least 0.03125, got 0.01"),
        (lambda: MobileNetV2(dropout=2), "dropout must be a number from 0 to 1, got 2"),
        (lambda: TINY(width=9), "width must be an even multiple of heads, 2, got 9"),
        (lambda: TINY(begin=0), "padding, begin and end must be different tokens below vocabulary, 11, got 0, 0 and 2"),
        (lambda: TINY(end=11), "padding, begin and end must be different tokens below vocabulary, 11, got 0, 1 and 11"),
        (lambda: TINY(layers=0), "layers must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
