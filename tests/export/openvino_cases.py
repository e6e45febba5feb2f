"""OpenVINO computes the same with exact zeros in int8, and what its kernels do with them is said."""

import copy
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import sparse_mlp, untouched
from torch import nn

from lightning_sparse.export import OpenVINOLayer, OpenVINOModel, benchmark, to_openvino
from lightning_sparse.export import measure as measuring
from lightning_sparse.export.openvino import _check_zeros, _lacks, _Weight, openvino_compiled

pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytest.importorskip("nncf", reason="the extra openvino is not installed")
NET, X = sparse_mlp(), torch.randn(3, 40)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network in int8, the file of it, and the batches that it was calibrated with."""
    path, batches = tmp_path_factory.mktemp("openvino") / "net.xml", [torch.randn(8, 40) for _ in range(4)]
    before = copy.deepcopy(NET.state_dict())
    with pytest.warns(UserWarning, match=r"Zeros make this network no faster in OpenVINO\. 0 of 2 layers .* need a"):
        int8 = to_openvino(NET, X, batches, path=path)
    assert untouched(NET, before)
    return int8, path, batches


def test_int8_keeps_each_zero_and_computes_nearly_the_same(exported):
    int8, _, _ = exported
    assert [layer.name for layer in int8.layers] == ["0.weight", "2.weight"]
    assert [layer.shape for layer in int8.layers] == [(50, 40), (4, 50)]
    for layer, weight in zip(int8.layers, (NET[0].weight, NET[2].weight), strict=True):
        assert layer.sparsity >= float((weight == 0).double().mean())
        assert layer.kernel.lower().endswith("_i8")
        assert layer.reason is not None
    x = torch.randn(7, 40)  # another batch size
    expected, found = NET(x).detach(), int8(x)
    assert found.shape == (7, 4)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    assert 0 < int8.error < 0.05


def test_the_file_holds_int8_weights_and_the_same_network(exported):
    int8, path, _ = exported
    assert path.with_suffix(".bin").stat().st_size < sum(x.nbytes for x in NET.state_dict().values()) / 2
    again = OpenVINOModel(openvino_compiled(path, 0.8), [], 0.0)
    assert torch.equal(again(X), int8(X))


def test_without_calibration_the_network_stays_in_float32():
    with pytest.warns(UserWarning, match=r"Such kernels need int8 weights and activations, and a processor with AMX"):
        float32 = to_openvino(NET, X)
    assert float32.error < 1e-5
    assert "need int8" in str(float32)
    assert float32.layers[0].sparsity == float((NET[0].weight == 0).double().mean())


def test_the_benchmark_has_accuracies_and_the_kernels_of_openvino(exported, monkeypatch):
    int8, _, batches = exported

    def written(*_, path, **__):
        path.write_text("the file")
        return int8

    monkeypatch.setattr(measuring, "to_onnx", lambda *args: 1 / 0)
    monkeypatch.setattr(measuring, "to_openvino", written)
    y = NET(X).argmax(1)
    table = benchmark(
        NET,
        X,
        batch_sizes=(1,),
        rounds=1,
        memory=False,
        calibration=iter(batches),
        accuracy=lambda net: float((net(X).argmax(1) == y).double().mean()),
    )
    names = ["OpenVINO", "OpenVINO int8", "compacted, OpenVINO int8"]
    assert [name for name in table.rows if "OpenVINO" in name] == names
    assert all(row.accuracy is not None for row in table.rows.values())
    assert table.rows["dense"].accuracy == 1
    assert table.notes == dict.fromkeys(names, int8.verdict)
    assert "| accuracy |" in str(table)
    assert "OpenVINO int8: 0 of 2 layers have kernels that skip zeros." in str(table)
    with pytest.raises(ValueError, match=r"accuracy must be a function of a network, got one of type float"):
        benchmark(NET, X, accuracy=0.5)


def test_the_memory_of_its_file_is_measured(exported, capsys, monkeypatch):
    int8, path, _ = exported
    torch.save((X,), path.parent / "inputs")

    def process(command, **_):
        measuring._print_peak(*command[3:])
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(subprocess, "run", process)
    skipped = {}
    assert measuring._peak("net", {"net": int8}, path.parent, skipped) is not None
    assert skipped == {}


@pytest.mark.parametrize(
    ("kernel", "shape", "sparsity", "amx", "lacks"),
    [
        ("brgemm_sparse_avx512_amx_I8", (64, 128), 0.9, True, None),
        ("brgemm_avx2_f32", (64, 128), 0.9, True, "int8 weights and activations, and a processor with AMX"),
        ("jit_gemm_i8", (64, 128), 0.9, False, "a processor with AMX"),
        ("brgemm_avx512_amx_i8", (64, 100), 0.9, True, "a matrix of sizes divisible by 64"),
        ("brgconv_avx512_amx_i8", (64, 64, 3, 3), 0.9, True, "a matrix of sizes divisible by 64"),
        ("brgemm_avx512_amx_i8", (64, 128), 0.7, True, "a share of zeros of min_sparsity=0.8"),
        ("brgemm_avx512_amx_i8", (64, 128), 0.9, True, "more than OpenVINO says"),
    ],
)
def test_what_a_kernel_lacks_to_skip_zeros_is_said(kernel, shape, sparsity, amx, lacks):
    assert _lacks(kernel, shape, sparsity, 0.8, amx) == lacks


def test_the_verdict_counts_the_sparse_kernels():
    layers = [OpenVINOLayer(*"ab", 0.9, "brgemm_sparse_avx512_amx_i8", None)]
    assert OpenVINOModel(None, layers, 0.0).verdict == "1 of 1 layers have kernels that skip zeros."


def test_a_zero_that_is_lost_is_an_error():
    weight = _Weight(np.array([[0.0, 1.0]]), ["a.weight"])
    _check_zeros({"product": weight}, {"product": _Weight(np.array([[0.0, 0.0]]), [])})
    with pytest.raises(RuntimeError, match=r"made zeros of a\.weight nonzero\. Leave calibration out"):
        _check_zeros({"product": weight}, {"product": _Weight(np.array([[1e-9, 1.0]]), [])})


def test_openvino_refuses_other_arguments(tmp_path):
    for wrong, said in ((X, "of type Tensor"), ("train", "of type str"), (5, "of type int")):
        with pytest.raises(ValueError, match=rf"calibration must be a list of inputs .* {said}\. Give \[x for x, _ in"):
            to_openvino(NET, X, wrong)
    with pytest.raises(
        ValueError, match=r"batches of 1 tensors, as forward takes them, got one of Tensor, Tensor\. Leave labels"
    ):
        to_openvino(NET, X, [(X, X)])
    with pytest.raises(ValueError, match=r"batches of 1 tensors, as forward takes them, got none\."):
        to_openvino(NET, X, [])
    with pytest.raises(ValueError, match=r"path must end in \.xml, got '.*net\.onnx'"):
        to_openvino(NET, X, path=tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"min_sparsity must be a number from 0 to 1, got 80"):
        to_openvino(NET, X, min_sparsity=80)
    with pytest.raises(ValueError, match=r"module must be an nn\.Module"):
        to_openvino(nn.Linear, X)
