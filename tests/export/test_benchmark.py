"""The benchmark of exports measures all variants and leaves the module alone; how long they take is not tested."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from exported import sparse_mlp, untouched
from torch import nn

from lightning_sparse.export import (
    Benchmark,
    Measurement,
    benchmark,
)
from lightning_sparse.export import measure as measuring

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------- benchmark


def test_the_benchmark_measures_all_variants_and_leaves_the_module_alone():
    net = sparse_mlp().train()
    with torch.no_grad():
        net[0].weight[10:] = 0
    before = copy.deepcopy(net.state_dict())
    table = benchmark(net, torch.randn(2, 40), batch_sizes=(1, 3), rounds=2, memory=False)
    assert list(table.rows) == ["dense", "compacted", "CSR", "ONNX", "compacted, ONNX"]
    assert all(ms > 0 for row in table.rows.values() for ms in row.milliseconds.values())
    assert table.rows["compacted"].file_bytes < table.rows["dense"].file_bytes
    assert table.sparse_file_bytes is not None
    assert "no layer has a sparsity" in table.skipped["compacted, CSR"]
    assert untouched(net, before)
    assert net.training


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_benchmark_shows_progress_on_a_terminal_alone(stream, monkeypatch):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(measuring, "to_onnx", lambda *args: 1 / 0)
    monkeypatch.setattr(measuring, "_peak", lambda *args: None)
    benchmark(nn.Linear(3, 2), torch.ones(2, 3), batch_sizes=(1, 4), rounds=1)
    shown = [title for title in ("exports:", "batch 1:", "batch 4:", "memory:") if title in err.getvalue()]
    assert shown == (["exports:", "batch 1:", "batch 4:", "memory:"] if stream is Terminal else [])
    assert stream is Terminal or not err.getvalue()


def test_the_table_says_which_one_pays():
    rows = {"dense": Measurement({1: 2.0}, 4 << 20, 64 << 20), "CSR": Measurement({1: 0.5}, 1 << 20, 80 << 20)}
    text = str(Benchmark(rows, {"ONNX": "onnx is not installed"}, 1 << 19))
    assert text.splitlines()[:4] == [
        "|  | batch 1 (ms) | file (MiB) | peak memory added (MiB) |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 2.000 | 4.00 | 64.0 |",
        "| CSR | 0.500 | 1.00 | 80.0 |",
    ]
    assert "Fastest at batch 1: CSR, 4.00 times better than dense." in text
    assert "Least memory: dense.\n" in text
    assert "save_sparse writes them: 0.50 MiB" in text
    assert "Not measured: ONNX: onnx is not installed" in text


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    torch.save((torch.randn(4, 2048),), tmp_path / "inputs")
    dense = nn.Sequential(nn.Linear(2048, 4096))  # 32 MiB
    added = measuring._peak("dense", {"dense": dense}, tmp_path, {})
    assert 30 << 20 < added < 90 << 20


class Local(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_memory_that_cannot_be_measured_is_left_out_with_the_reason(tmp_path, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nAttributeError: no such class")

    monkeypatch.setattr(subprocess, "run", fail)
    skipped = {}
    assert measuring._peak("dense", {"dense": Local()}, tmp_path, skipped) is None
    assert skipped == {"memory of dense": "AttributeError: no such class"}


def test_the_benchmark_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        benchmark(nn.Linear(2, 2), torch.ones(1, 2), rounds=0)
    with pytest.raises(ValueError, match="one device, the CPU or a CUDA GPU, got tensors on cpu, meta"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"got tensors on meta. Give module.to\(device\)"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.ones(1, 2, device="meta"))
