"""Exports of sparse layers."""

import copy
import subprocess
from types import SimpleNamespace

import pytest
import torch
from exported import same_results, sparse_net, untouched
from helpers import Largest
from torch import nn

from lightning_sparse.export import (
    CSRConv2d,
    CSRLinear,
    benchmark,
    compact,
    load_sparse,
    measure,
    save_sparse,
    to_csr,
    to_onnx,
    to_semi_structured,
)
from lightning_sparse.storage import SparseConv2d, SparseLinear, load_dense, to_dense

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------- sparse layers


def test_sparse_layers_become_csr_whatever_their_sparsity():
    net = sparse_net()
    before = copy.deepcopy(net.state_dict())
    csr = to_csr(net)
    assert [type(csr[i]) for i in (0, 2, 4, 6)] == [CSRConv2d, CSRConv2d, CSRLinear, nn.Linear]
    assert untouched(net, before)
    assert not {x.data_ptr() for x in csr.state_dict().values()} & {x.data_ptr() for x in net.state_dict().values()}
    x = torch.randn(5, 3, 8, 8)
    assert same_results(to_dense(copy.deepcopy(net)), csr, x)
    assert isinstance(to_csr(SparseLinear(4, 3, nnz=6)), CSRLinear)


def test_no_dense_weight_is_made_for_csr_and_files(tmp_path):
    net = nn.Sequential(SparseLinear(300, 300, nnz=900), SparseConv2d(100, 100, 3, nnz=900))
    with Largest() as largest:
        to_csr(net)
        save_sparse(net, tmp_path / "file")
    assert 900 <= largest.size < 300 * 300 / 10


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("compact", lambda net, path: compact(net, torch.randn(2, 3, 8, 8))),
        ("to_onnx", lambda net, path: to_onnx(net, path, torch.randn(2, 3, 8, 8))),
        ("to_semi_structured", lambda net, path: to_semi_structured(net)),
    ],
)
def test_what_needs_dense_weights_names_the_sparse_layers_and_the_remedy(name, export, tmp_path):
    remedy = r"Give it lightning_sparse\.storage\.to_dense\(copy\.deepcopy\(module\)\).* take 0\.0 MiB"
    with pytest.raises(ValueError, match=rf"{name} needs dense .* layers are sparse: 0, 2, 4\. {remedy}"):
        export(sparse_net(), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"are sparse: the module\..* take 4\.0 MiB"):
        export(SparseLinear(1024, 1024, nnz=5), tmp_path / "net.onnx")


def test_with_the_remedy_sparse_layers_are_compacted():
    net, x = sparse_net(), torch.randn(2, 3, 8, 8)
    small, report = compact(to_dense(copy.deepcopy(net)), x)
    assert report.parameters[1] < report.parameters[0]
    assert same_results(net, small, x)


def test_files_of_sparse_layers_are_loaded_by_the_plain_module(tmp_path):
    net = sparse_net()
    dense = to_dense(copy.deepcopy(net))
    for state in (net, net.state_dict()):  # a checkpoint of nonzeros alone has such a state dict
        save_sparse(state, tmp_path / "file")
        loaded = load_sparse(tmp_path / "file")
        assert loaded.keys() == dense.state_dict().keys() == load_dense({"state_dict": net.state_dict()}).keys()
        other = to_dense(sparse_net())
        nn.init.zeros_(other[0].weight)
        other.load_state_dict(loaded)
        assert untouched(other, dense.state_dict())


def test_sparse_layers_under_two_names_are_written_once(tmp_path):
    layer = SparseLinear(100, 100, nnz=1000)
    save_sparse(nn.Sequential(layer, layer), tmp_path / "file")
    loaded = load_sparse(tmp_path / "file")
    assert loaded["1.weight"] is loaded["0.weight"]
    assert torch.equal(loaded["0.weight"], layer.dense_weight())


def test_the_benchmark_measures_sparse_layers_beside_their_dense_twin(monkeypatch, capsys):
    def process(command, **_):  # in this one, that it takes no seconds
        measure._print_peak(*command[3:])
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(subprocess, "run", process)
    net, x = sparse_net(), torch.randn(2, 3, 8, 8)
    table = benchmark(net, x, batch_sizes=(1, 3), rounds=2, memory=False)
    assert list(table.rows)[:4] == ["dense", "sparse layers", "compacted", "CSR"]
    assert {type(layer) for layer in net} >= {SparseLinear, SparseConv2d}
    monkeypatch.setattr(measure, "TWIN_LIMIT", 1000)
    table = benchmark(net, x, batch_sizes=(1,), rounds=2)
    assert list(table.rows) == ["sparse layers", "CSR"]
    assert all(row.memory_bytes is not None for row in table.rows.values())
    assert table.skipped["compacted"].startswith("compact needs dense weights")
    assert table.skipped["ONNX"].startswith("to_onnx needs dense weights")
    assert "Smallest file: CSR" in str(table)
    assert "better than sparse layers." in str(table)
