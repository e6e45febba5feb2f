"""Exports of a module on a GPU stay there, compute what it computes, and are measured there."""

import copy
import re

import pytest
import torch
from helpers import prune, two_of_four
from torch import nn

from lightning_sparse.export import (
    CSRConv2d,
    CSRLinear,
    benchmark,
    compact,
    load_sparse,
    save_sparse,
    to_csr,
    to_semi_structured,
)
from lightning_sparse.storage import SparseConv2d, SparseLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def allow_tf32(matmul, convolution):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


@pytest.fixture(autouse=True)
def _float32_in_full():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False, False)
    yield
    allow_tf32(*before)


@pytest.fixture
def ampere():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")


def convolutions(**pruned):
    """Make a network whose dead channels meet padding, a bias that takes them up, flattening and a ``Select``."""
    net = nn.Sequential(
        *(nn.Conv2d(6, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Sigmoid()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)),
    )
    return prune(net, **pruned).cuda()


def linears(sparsity=0.95):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    with torch.no_grad():
        net[0].weight *= torch.rand(256, 256) > sparsity
        net[0].weight[64:] = 0
    return net.cuda()


def halves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight *= two_of_four(*layer.weight.shape)
    return net.cuda().half()


def images(batch):
    return torch.randn(batch, 6, 8, 8, device="cuda")


def assert_same(module, export, x, tolerance=1e-5):
    with torch.no_grad():
        expected, found = module(x), export(x)
    assert found.is_cuda
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def test_a_compacted_module_stays_on_the_gpu_and_computes_the_same():
    net = convolutions()
    small, report = compact(net, images(2), tolerance=1e-5)
    assert report.parameters[1] < report.parameters[0]
    assert any(name.startswith("select") for name, _ in small.named_children())
    assert all(tensor.is_cuda for tensor in small.state_dict().values())
    assert_same(net, small, images(5))


def test_compacting_compares_without_tf32_and_leaves_it_as_it_was():
    allow_tf32(True, True)
    net = convolutions()
    small, _ = compact(net, images(64))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert_same(net, small, images(64), tolerance=1e-2)


@pytest.mark.parametrize("batch", [1, 5])
def test_csr_layers_on_the_gpu_compute_the_same(batch):
    net = convolutions(weights=0.9)
    csr = to_csr(net, min_sparsity=0.5)
    assert [type(csr[place]) for place in (0, 3, 7, 10)] == [CSRConv2d, CSRConv2d, CSRConv2d, CSRLinear]
    assert all(tensor.is_cuda for tensor in csr.state_dict().values())
    assert_same(net, csr, images(batch))


@pytest.mark.parametrize("batch", [1, 5])
def test_sparse_layers_on_the_gpu_become_csr_layers(batch):
    net = convolutions(weights=0.9)
    sparse = copy.deepcopy(net)
    for place in (0, 3, 7):
        sparse[place] = SparseConv2d.from_dense(net[place])
    sparse[10] = SparseLinear.from_dense(net[10])
    assert all(tensor.is_cuda for tensor in sparse.state_dict().values())
    assert_same(net, to_csr(sparse), images(batch))


def test_the_benchmark_measures_on_the_gpu():
    net = linears()
    table = benchmark(net, torch.randn(2, 256, device="cuda"), batch_sizes=(1, 128), rounds=3)
    assert {"dense", "compacted", "CSR"} <= set(table.rows)
    for row in table.rows.values():
        assert row.milliseconds.keys() == {1, 128}
        assert min(row.milliseconds.values()) > 0
        assert row.memory_bytes > 0
    weights = sum(parameter.nbytes for parameter in net.parameters())
    assert table.rows["dense"].memory_bytes >= weights + 128 * (256 + 10) * 4
    assert table.rows["compacted"].file_bytes < table.rows["dense"].file_bytes
    assert "only on the CPU" in table.skipped["ONNX"]
    assert "None of the 2 Linear layers has the 2:4 pattern" in table.skipped["2:4"]
    text = str(table)
    assert all(f"| {name} |" in text for name in ("dense", "compacted", "CSR"))
    assert "Least memory: " in text
    assert all(parameter.is_cuda for parameter in net.parameters())


def test_the_benchmark_waits_for_the_gpu(monkeypatch):
    seen, wait = [], torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: (seen.append("W"), wait(device)))
    net = nn.Linear(64, 64).cuda()
    net.register_forward_hook(lambda *_: seen.append("r"))
    benchmark(net, torch.randn(1, 64, device="cuda"), batch_sizes=(8,), rounds=1, memory=False)
    assert re.search("Wr+W$", "".join(seen))


def test_the_benchmark_measures_sparse_layers_on_the_gpu_beside_their_dense_twin():
    net = linears()
    net[0] = SparseLinear.from_dense(net[0])
    table = benchmark(net, torch.randn(2, 256, device="cuda"), batch_sizes=(1, 8), rounds=2)
    assert list(table.rows)[:2] == ["dense", "sparse layers"]
    assert table.rows["sparse layers"].memory_bytes > 0
    assert isinstance(net[0], SparseLinear)


def test_the_benchmark_refuses_tensors_on_several_devices():
    with pytest.raises(ValueError, match=r"one device, .*, got tensors on cpu, cuda:0\. Give module\.to\(device\)"):
        benchmark(nn.Linear(2, 2).cuda(), torch.ones(1, 2))


@pytest.mark.usefixtures("ampere")
def test_a_semi_structured_module_computes_the_same():
    net = halves()
    fast = to_semi_structured(net)
    assert isinstance(fast[0].weight, torch.sparse.SparseSemiStructuredTensor)
    assert isinstance(fast[2].weight, torch.sparse.SparseSemiStructuredTensor)
    for batch in (1, 5, 64):
        assert_same(net, fast, torch.randn(batch, 128, device="cuda").half(), tolerance=1e-2)


@pytest.mark.usefixtures("ampere")
def test_the_benchmark_measures_semi_structured_sparsity():
    x = torch.randn(2, 128, device="cuda").half()
    table = benchmark(halves(), x, batch_sizes=(1, 64), rounds=2)
    assert "2:4" in table.rows, table.skipped
    row, dense = table.rows["2:4"], table.rows["dense"]
    assert min(row.milliseconds.values()) > 0
    assert row.memory_bytes > 0
    assert 0.5 < row.file_bytes / dense.file_bytes < 0.9  # half of the values, and where they are
    assert "| 2:4 |" in str(table)


@pytest.mark.usefixtures("ampere")
def test_the_benchmark_says_why_there_is_no_semi_structured_sparsity():
    table = benchmark(halves().float(), torch.randn(2, 128, device="cuda"), batch_sizes=(1,), rounds=1, memory=False)
    assert "2:4" not in table.rows
    assert "in float16 or bfloat16, but 0.weight is torch.float32" in table.skipped["2:4"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_files_of_nonzeros_bring_back_a_module_from_the_gpu(device, tmp_path):
    pytest.importorskip("safetensors")
    net = convolutions(weights=0.9)
    save_sparse(net, tmp_path / "net.safetensors")
    found = load_sparse(tmp_path / "net.safetensors", device)
    assert found.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert found[name].device.type == device
        assert torch.equal(found[name].to("cuda") + 0, tensor + 0), name  # -0.0 becomes 0.0
