"""Files of nonzeros bring back every bit; exports refuse what they cannot hold."""

import os

import pytest
import torch
from exported import bits, untouched
from helpers import Largest, prune
from torch import nn

from lightning_sparse.export import (
    benchmark,
    compact,
    load_sparse,
    save_sparse,
    to_csr,
    to_onnx,
    to_semi_structured,
)
from lightning_sparse.export.gaps import gaps, gaps_to_positions
from lightning_sparse.storage import SparseLinear

safe_open = pytest.importorskip("safetensors").safe_open
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]

# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_files_bring_back_every_bit(tmp_path, dtype, density):
    state = {
        "a.weight": (torch.randn(60, 70) * 9 * (torch.rand(60, 70) < density)).abs().to(dtype),
        "a.bias": torch.zeros(3).to(dtype),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    if dtype.is_floating_point:
        state["a.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -1e-7]).to(dtype)
    save_sparse(state, tmp_path / "net.safetensors")
    loaded = load_sparse(tmp_path / "net.safetensors")
    assert loaded.keys() == state.keys()
    for name, x in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (x.dtype, x.shape)
        assert torch.equal(bits(loaded[name]), bits(x))


def test_the_size_of_a_file_is_in_proportion_to_the_nonzeros(tmp_path):
    def size(count):
        weight = torch.zeros(1000, 1000)
        weight.view(-1)[torch.randperm(10**6)[:count]] = 1.5
        save_sparse({"weight": weight}, tmp_path / "file")
        return os.path.getsize(tmp_path / "file")

    empty = size(0)
    assert empty < 1000
    assert [size(count) - empty for count in (100, 1000)] == pytest.approx([800, 8e3], abs=100), "indices"
    assert size(20_000) <= 0.026 * 4e6
    assert size(100_000) <= 0.1251 * 4e6
    assert size(700_000) - empty == pytest.approx(3.5e6, abs=100)
    assert size(850_000) == pytest.approx(4e6, abs=1000), "dense, where that is smaller"


def test_gaps_of_any_length_come_back(tmp_path):
    weight = torch.zeros(40_000)
    lengths = [0, 1, 253, 254, 255, 256, 509, 510, 511, 3000, 0]
    positions = torch.tensor(lengths).add(1).cumsum(0) - 1
    weight[positions] = torch.arange(1.0, 12.0)
    assert torch.equal(gaps_to_positions(gaps(positions), 40_000), positions)
    assert gaps(positions).tolist()[:7] == [0, 1, 253, 254, 255, 0, 255]
    weight = weight.repeat(4)
    weight[-1] = 5.0
    save_sparse({"weight": weight, "end": torch.eye(1, 9000).flip(1)}, tmp_path / "file")
    loaded = load_sparse(tmp_path / "file")
    assert torch.equal(loaded["weight"], weight)
    assert torch.equal(loaded["end"], torch.eye(1, 9000).flip(1))


def test_files_of_the_first_format_still_load(tmp_path):
    places, values = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([1.0, 2.0, 3.0])
    header = {"format": "lightning_sparse 1", "sparse": '{"a": [2, 4]}', "tied": '{"b": "a"}'}
    parts = {"a.indices": places, "a.values": values, "bias": torch.ones(2)}
    pytest.importorskip("safetensors.torch").save_file(parts, tmp_path / "file", metadata=header)
    loaded = load_sparse(tmp_path / "file")
    assert loaded["a"].tolist() == [[1, 0, 0, 2], [0, 3, 0, 0]]
    assert loaded["b"] is loaded["a"]
    assert loaded["bias"].tolist() == [1, 1]


def test_no_more_memory_is_asked_for_gaps_than_for_indices(tmp_path):
    layer = SparseLinear(2**20, 2**20, nnz=5)
    with Largest() as largest:
        save_sparse(layer, tmp_path / "file")
    assert largest.size <= 2**20 + 1
    assert "weight.indices" in safe_open(tmp_path / "file", "pt").keys()  # noqa: SIM118


def test_negative_zeros_take_no_room_and_become_zeros(tmp_path):
    save_sparse({"weight": -torch.zeros(100, 100)}, tmp_path / "file")
    assert not torch.signbit(load_sparse(tmp_path / "file")["weight"]).any()
    assert os.path.getsize(tmp_path / "file") < 1000


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    net[1].weight = net[0].weight
    save_sparse(net, tmp_path / "file")
    assert os.path.getsize(tmp_path / "file") < 1.5 * net[0].weight.nbytes
    loaded = load_sparse(tmp_path / "file")
    assert loaded["1.weight"] is loaded["0.weight"]
    net.load_state_dict(loaded)


def test_a_module_comes_back_from_its_file(tmp_path):
    net, other = prune(nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50)), outputs=0.9), None
    net = net.to(memory_format=torch.channels_last)
    save_sparse(net, tmp_path / "file")
    other = nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50)).eval()
    other.load_state_dict(load_sparse(tmp_path / "file"))
    assert untouched(other, net.state_dict())


def test_files_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"'epoch' is of type int.*checkpoint\['state_dict'\]"):
        save_sparse({"epoch": 3}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"a tensor of layout torch\.sparse_coo"):
        save_sparse({"x": torch.zeros(3).to_sparse()}, tmp_path / "file")
    with pytest.raises(ValueError, match="names in state must not collide"):
        save_sparse({"x.values": torch.ones(2), "x": torch.zeros(1000)}, tmp_path / "file")
    pytest.importorskip("safetensors.torch").save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must be a file of save_sparse, got '.*other': its format is None"):
        load_sparse(tmp_path / "other")


def test_loading_says_what_a_wrong_file_is_and_what_reads_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"path must be a file that exists, got '.*nowhere'. Give one that save_"
    ):
        load_sparse(tmp_path / "nowhere")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"got '.*last.ckpt': it is not a safetensors .* read by lightning_sparse.load"
    ):
        load_sparse(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="path must be the path of a file, got one of type dict"):
        load_sparse({})
    with pytest.raises(ValueError, match="state must be a state dict or a module, got one of type list"):
        save_sparse([torch.ones(2)], tmp_path / "file")


@pytest.mark.parametrize(
    "export",
    [
        lambda module, path: compact(module, torch.ones(2, 3)),
        lambda module, path: to_csr(module),
        lambda module, path: to_onnx(module, path, torch.ones(2, 3)),
        lambda module, path: to_semi_structured(module),
        lambda module, path: benchmark(module, torch.ones(2, 3)),
    ],
)
@pytest.mark.parametrize("module", [{"state_dict": {}}, "last.ckpt"])
def test_exports_refuse_what_is_no_module(export, module, tmp_path):
    with pytest.raises(
        ValueError, match=r"module must be an nn.Module, got one of type (dict|str)\. .*load_from_check"
    ):
        export(module, tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "export",
    [
        lambda example, path: compact(nn.Linear(3, 2), example),
        lambda example, path: to_onnx(nn.Linear(3, 2), path, example),
        lambda example, path: benchmark(nn.Linear(3, 2), example),
    ],
)
def test_exports_refuse_what_is_no_example_of_an_input(export, tmp_path):
    for wrong in (None, [torch.ones(2, 3)], "net.onnx"):
        with pytest.raises(
            ValueError, match=rf"example_input must be a tensor, .* type {type(wrong).__name__}\. Give a"
        ):
            export(wrong, tmp_path / "net.onnx")


def test_some_exports_take_tensors_alone_and_onnx_a_folder_that_exists(tmp_path):
    for export in (
        lambda x: to_onnx(nn.Linear(3, 2), tmp_path / "net.onnx", x),
        lambda x: benchmark(nn.Linear(3, 2), x),
    ):
        with pytest.raises(ValueError, match=r"example_input must be a tensor, or a tuple of tensors, .* int, str"):
            export((torch.ones(2, 3), 1, "mean"))
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got '.*net\.onnx'\. Make"):
        to_onnx(nn.Linear(3, 2), tmp_path / "nowhere" / "net.onnx", torch.ones(2, 3))
