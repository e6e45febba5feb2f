"""On a GPU: what holds on the CPU, for every method. Skipped where there is none."""

import json

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    NETS,
    ROUNDS,
    SETTINGS,
    Lit,
    SavesFirst,
    Watch,
    cnn,
    effective,
    fit,
    loader,
    mlp,
    same,
    saved,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.loggers import CSVLogger
from stored import METHODS, images, tokens
from torch import nn

from lightning_sparse import DFBST, RigL, SparsityMonitor
from lightning_sparse.kernels import geometry
from lightning_sparse.rules import select
from lightning_sparse.storage import BlockLinear, SparseConv2d, SparseLayer, SparseLinear, load_dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = {"accelerator": "gpu", "devices": 1}
ALL = {**SETTINGS, **ROUNDS}


@pytest.fixture(autouse=True)
def no_short_cuts(monkeypatch):
    """Arithmetic in the precision of its tensors, and products that CUDA can repeat to the last bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def exact(network, optimizer=None):
    return seeded(lambda: Lit(network().double(), optimizer))


def plain_cnn():
    """``cnn`` without its batch-norm, which divides rounding errors by the variance of channels that have none."""
    return nn.Sequential(*(layer for layer in cnn() if not isinstance(layer, nn.BatchNorm2d)))


NETWORKS = {**NETS, "cnn": plain_cnn}


def trained(method, network, **options):
    callback = ALL[method]()
    options = {"max_epochs": 3 if method in ROUNDS else 2, "precision": "64-true", **options}
    module, _ = fit(callback, exact(NETWORKS[network]), loader(dtype=torch.float64), **options)
    return callback, module


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ALL)
def test_training_is_that_of_the_cpu(method, network):
    (theirs, expected), (ours, module) = trained(method, network), trained(method, network, **GPU)
    assert ours.masks.keys() == theirs.masks.keys()
    for name, mask in theirs.masks.items():
        assert torch.equal(ours.masks[name].cpu(), mask), name
    for name, parameter in expected.named_parameters():
        assert (module.get_parameter(name).cpu() - parameter).norm() <= 1e-7 * (1 + parameter.norm()), name
    assert effective(module.cpu(), ours)


def stopped_and_resumed(make, path, **options):
    """A whole run and one that goes on from its checkpoint: callback, and what a checkpoint of its end holds."""
    whole, resumed = make(), make()
    _, run = fit([whole, SavesFirst(path / "middle.ckpt")], seeded(Lit), **GPU, **options)
    want = saved(run, path / "whole.ckpt")
    run = trainer(resumed, **GPU, **options)
    run.fit(seeded(Lit, 5), loader(), ckpt_path=path / "middle.ckpt")
    have = saved(run, path / "resumed.ckpt")
    assert have["global_step"] == want["global_step"]
    return whole, want, resumed, have


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("deterministic", [True, None])
@pytest.mark.parametrize("method", ALL)
def test_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(method, deterministic, tmp_path):
    options = {"max_epochs": 3, "deterministic": deterministic}
    whole, want, resumed, have = stopped_and_resumed(ALL[method], tmp_path, **options)
    assert same(on_cpu(want["state_dict"]), on_cpu(have["state_dict"]))
    assert same(on_cpu(state(whole)), on_cpu(state(resumed)))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=1e-2, fused=True),
    ],
    ids=["SGD", "fused AdamW"],
)
@pytest.mark.parametrize("method", ALL)
def test_inactive_weights_stay_exactly_0(method, optimizer, precision):
    callback = ALL[method]()
    looks = Watch(callback)
    epochs = 3 if method in ROUNDS else 2
    module, run = fit(
        [callback, looks],
        seeded(lambda: Lit(optimizer=optimizer)),
        max_epochs=epochs,
        precision=precision,
        accumulate_grad_batches=2,
        **GPU,
    )
    assert len(looks.masks) == 30 * epochs
    assert run.global_step <= 15 * epochs
    assert 0.01 < callback.density < 0.99
    assert effective(module.cpu(), callback)


@pytest.mark.parametrize("method", ["RigL", "GGR", "TopKAST", "DFBST", "SNIP"])
def test_a_checkpoint_of_the_gpu_is_loaded_on_the_cpu(method, tmp_path):
    callback = ALL[method]()
    module, run = fit(callback, **GPU)
    run.save_checkpoint(tmp_path / "gpu.ckpt")
    plain = Lit()
    plain.load_state_dict(torch.load(tmp_path / "gpu.ckpt", map_location="cpu", weights_only=True)["state_dict"])
    assert same(plain.state_dict(), module.cpu().state_dict())
    assert effective(plain, callback)
    second = ALL[method]()
    run = trainer(second, max_epochs=3)
    run.fit(plain, loader(), ckpt_path=tmp_path / "gpu.ckpt")
    assert run.global_step == 90
    assert effective(plain, second)


# ---------------------------------------------------------------------- sparse layers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [mlp, images, tokens])
def test_sparse_storage_trains_as_masks_do(method, network):
    def train(storage):
        callback = METHODS[method](seed=3, **({"storage": storage} if storage == "sparse" else {}))
        module, _ = fit(callback, exact(network), loader(dtype=torch.float64), precision="64-true", **GPU)
        return callback, module

    (sparse, ours), (masked, theirs) = train("sparse"), train("masked")
    for name, mask in masked.masks.items():
        assert torch.equal(sparse.masks[name].cpu(), mask.cpu()), name
    for name, parameter in theirs.named_parameters():
        assert (ours.get_parameter(name) - parameter).norm() <= 1e-9 * (1 + parameter.norm()), name


class Counts(pl.Callback):
    """The nonzeros of all sparse layers after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, run, module, *args):
        layers = [layer for layer in module.modules() if isinstance(layer, SparseLayer)]
        assert {layer.values.device.type for layer in layers} == {"cuda"}
        assert all(len(layer.values) == len(layer.col) for layer in layers)
        self.seen.append(sum(layer.nnz for layer in layers))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", METHODS)
def test_sparse_storage_keeps_its_budget(method, precision):
    callback, counts = METHODS[method](storage="sparse"), Counts()
    module, _ = fit([callback, counts], precision=precision, **GPU)
    budget = 392 - round(0.8 * 392)
    assert len(counts.seen) == 60
    assert set(counts.seen) == {budget} or (method == "MEST soft bound" and counts.seen[-1] == budget)
    assert all(not module.get_parameter(name).cpu()[~mask.cpu()].any() for name, mask in callback.masks.items())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("chunk", [1, None])
def test_sparse_layers_equal_dense_ones(density, dtype, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(geometry, "_GPU_CHUNK", chunk)
    torch.manual_seed(0)
    layers = [
        (nn.Linear(70, 50, dtype=dtype), torch.randn(5, 3, 70, dtype=dtype)),
        (nn.Conv2d(6, 8, 3, 2, 1, dtype=dtype), torch.randn(5, 6, 9, 9, dtype=dtype)),
        (nn.Conv2d(6, 9, (3, 1), 1, "same", 2, 3, False, "reflect", dtype=dtype), torch.randn(5, 6, 9, 9, dtype=dtype)),
        (nn.Conv2d(6, 8, 1, dtype=dtype), torch.randn(5, 6, 9, 9, dtype=dtype)),
    ]
    for dense, x in layers:
        with torch.no_grad():
            dense.weight.mul_(torch.rand_like(dense.weight) < density)
        dense, x = dense.cuda(), x.cuda().requires_grad_()
        kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
        sparse, z = kind.from_dense(dense), x.detach().clone().requires_grad_()
        y, expected = sparse(z), dense(x)
        weights = torch.randn_like(expected)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs = [(y, expected), (z.grad, x.grad)]
        pairs.append((sparse.values.grad, dense.weight.grad.reshape(-1)[sparse.positions]))
        if dense.bias is not None:
            pairs.append((sparse.bias.grad, dense.bias.grad))
        for ours, theirs in pairs:
            limit = 1e-4 if dtype == torch.float32 else 1e-10
            assert (ours - theirs).norm() <= limit * theirs.norm() + torch.finfo(dtype).tiny


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_sparse_storage_resumes_to_the_last_bit(method, plain, tmp_path):
    def make():
        return METHODS[method](storage="sparse", plain_checkpoints=plain)

    whole, want, resumed, have = stopped_and_resumed(make, tmp_path, max_epochs=3)
    assert same(on_cpu(load_dense(have)), on_cpu(load_dense(want)))
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())


# ---------------------------------------------------------------------- parts


def test_positions_of_extremes_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(50, (400_000,), generator=generator).float()  # nearly all are ties
    among = torch.rand(400_000, generator=generator) < 0.7
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for k in (1, 1000, 200_000):
            for find in (select.top_k_positions, select.lowest_positions):
                assert torch.equal(find(scores.cuda(), k, among.cuda()).cpu(), find(scores, k, among))


def test_the_monitor_measures_memory_and_time_of_the_gpu(tmp_path):
    monitor = SparsityMonitor()
    fit([RigL(0.8, update_every=7), monitor], logger=CSVLogger(tmp_path), log_every_n_steps=5, **GPU)
    (file,) = tmp_path.rglob("sparsity.json")
    run = json.loads(file.read_text())
    last = run["epochs"][-1]
    assert torch.cuda.get_device_name() in str(run["hardware"])
    assert 0 < last["peak_memory_bytes"] <= torch.cuda.max_memory_allocated()
    assert last["step_time_s"] > 0
    assert last["density"] == pytest.approx(78 / 392)


def test_compiled_training_is_that_of_eager():
    def train(compiled):
        module = exact(mlp)
        callback = DFBST(alpha=5e-3, beta=0.5)
        batches = loader(dtype=torch.float64)
        fit(callback, torch.compile(module) if compiled else module, batches, precision="64-true", **GPU)
        return callback, module

    (ours, a), (theirs, b) = train(True), train(False)
    for name, mask in theirs.masks.items():
        assert torch.equal(ours.masks[name].cpu(), mask.cpu())
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(x.cpu(), y.cpu(), atol=1e-8)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (3, 4)])
def test_layers_of_blocks_multiply_as_dense_ones_in_the_precision_that_is_asked_for(block, dtype, tolerance, backend):
    layer = BlockLinear(8 * block[1], 7 * block[0], 20, block, generator=torch.Generator().manual_seed(0)).cuda()
    dense, layer.backend = layer.to_dense(), backend
    ours, theirs = (torch.randn(300, layer.in_features, device="cuda").requires_grad_() for _ in range(2))
    theirs.data.copy_(ours)
    for model, x in ((layer, ours), (dense, theirs)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = model(x)
        assert y.dtype == dtype
        y.float().pow(2).sum().backward()
    gradients = (ours.grad, theirs.grad), (layer.values.grad, dense.weight.grad.flatten()[layer.positions])
    for a, b in (*gradients, (layer.bias.grad, dense.bias.grad)):
        assert (a - b).norm() <= tolerance * b.norm()


def test_blocks_train_as_masks_do():
    weights = []
    for storage in ("masked", "block"):
        callback = RigL(0.6, pattern="block:2x2", update_every=5, seed=3, storage=storage)
        module, _ = fit(callback, exact(mlp), loader(dtype=torch.float64), precision="64-true", **GPU)
        weights.append((callback.masks, module.state_dict()))
    (masks, theirs), (others, ours) = weights
    assert same(on_cpu(masks), on_cpu(others))
    assert all(torch.allclose(x, ours[name], rtol=0, atol=1e-10) for name, x in theirs.items())
