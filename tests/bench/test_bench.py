"""Benchmarks run and print what they measure; how long it takes is not tested."""

import contextlib
import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_sparse.bench import convolutions, measure, program, semi_structured
from lightning_sparse.bench import storage as benchmarks
from lightning_sparse.bench.__main__ import main
from lightning_sparse.compat.lightning import PACKAGE
from lightning_sparse.kernels import dispatch

SMALL = ["--network", "lenet300", "--batch", "2", "--rounds", "1", "--seconds", "0.001"]


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that runs a benchmark, with its processes in this one, and returns the lines that it prints."""

    def here(command, **options):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(command[3:])
        return SimpleNamespace(stdout=out.getvalue())

    monkeypatch.setattr(measure, "subprocess", SimpleNamespace(run=here, PIPE=None))
    monkeypatch.setattr(
        measure, "peak_memory", lambda: measure.resident_memory() + 1e6
    )  # no peak is above this process's
    threads, logger = torch.get_num_threads(), logging.getLogger(PACKAGE)
    level = logger.level

    def run(*arguments):
        main([*arguments, *SMALL])
        return capsys.readouterr().out.splitlines()

    yield run
    torch.set_num_threads(threads)
    logger.setLevel(level)


NUMBER = r"-?\d+(\.\d+)?"
KINDS = [("dense", "0"), ("masked", "0.9"), ("sparse", "0.9")]
MIDDLE = rf"{NUMBER} \({NUMBER} to {NUMBER}\)"


@pytest.mark.parametrize(("benchmark", "unknown"), [("update", "memory-efficient-dst"), ("overhead", "gmp")])
def test_a_method_that_does_not_exist_is_refused_before_anything_is_timed(capsys, benchmark, unknown):
    with pytest.raises(SystemExit):
        main([benchmark, "--methods", f"set,{unknown}"])
    assert f"no method is called '{unknown}'" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["overhead", "trainer", "memory", "monitor"])
def test_each_method_has_a_line_of_ratios(printed, benchmark):
    ratio = rf": {MIDDLE}" if benchmark != "memory" else rf": {NUMBER};"
    lines = printed(benchmark, "--methods", "dst,rigl", "--steps", "3")
    for name in ("dst", "rigl"):
        (line,) = (line for line in lines if line.startswith(name))
        assert re.search(ratio, line), line


def test_each_convolution_has_a_line_of_ratios(printed, monkeypatch):
    monkeypatch.setattr(convolutions, "_LAYERS", ((3, 4), (2, 2)))
    lines = printed("convolutions", "--sparsities", "0.5")
    assert len(lines) == 1 + 2
    for line in lines[1:]:
        assert re.fullmatch(rf"0.5 .* dense {NUMBER} ms  numba {MIDDLE}  torch {MIDDLE}(  sparseprop .*)?", line), line


def test_each_form_of_a_layer_of_blocks_has_a_line_of_ratios(printed, monkeypatch):
    monkeypatch.setattr(dispatch, "module", lambda kind, backend: None)  # nothing is compiled
    lines = printed("blocks", "--width", "32", "--sparsities", "0.5")
    assert len(lines) == 1 + 1 + 2
    for line, form in zip(lines[2:], ("blocks", "single nonzeros"), strict=True):
        assert re.fullmatch(rf"0.5  {form}, torch +{MIDDLE}", line), line


def test_operators_for_2_4_weights_are_timed_where_there_are_any(printed, monkeypatch):
    line = rf"64 x 64, 8 rows: dense {NUMBER} ms"
    assert re.fullmatch(rf"{line}  not on an NVIDIA GPU", printed("semi-structured")[-1])
    monkeypatch.setattr(semi_structured, "why_dense", lambda *shape, both: None)
    monkeypatch.setattr(semi_structured, "linear_2_4", lambda x, W, bias, both: nn.functional.linear(x, W, bias))
    both = rf"output 2:4 {MIDDLE}  output and input gradient 2:4 {MIDDLE}"
    assert re.fullmatch(rf"{line}  {both}", printed("semi-structured")[-1])


def test_updates_are_timed_with_both_storages(printed):
    lines = printed("update", "--methods", "rigl", "--storages", "masked,sparse", "--sparsities", "0.8")
    for line, storage in zip(lines[-2:], ("masked", "sparse"), strict=True):
        assert re.fullmatch(
            rf"0.8 rigl +{storage} +update: {MIDDLE} ms, {NUMBER} of the .*; peak {NUMBER} MB .*", line
        ), line


def test_a_method_without_updates_of_its_own_is_refused(printed):
    with pytest.raises(ValueError, match="--methods: an update of deepr cannot be measured by itself"):
        printed("update", "--methods", "deepr")


def test_the_ranking_is_timed(printed):
    assert re.fullmatch(rf"0.9 ranking: {MIDDLE} ms", printed("ranking")[-1])


def test_hooks_are_timed(printed):
    assert re.fullmatch(rf"hooks: {MIDDLE} us a step more than {NUMBER}", printed("hooks", "--steps", "5")[-1])


def test_masks_and_each_backend_have_a_line(printed):
    lines = printed("storage", "--sparsities", "0.8", "--precision", "bf16-mixed")[2:]
    assert re.fullmatch(rf"dense step: {NUMBER} ms", lines.pop())
    assert re.fullmatch(rf"0.8 +sparse +step time over masked {MIDDLE}", lines.pop())
    kinds = [re.fullmatch(rf"0.8 +(\w+) +step time {MIDDLE} +peak memory {NUMBER}", line)[1] for line in lines]
    assert kinds[:2] == ["masked", "sparse"]
    assert kinds[-1] == "torch"


def test_a_fit_is_measured_beside_a_dense_one(printed):
    lines = printed("fit", "--sparsities", "0.8", "--steps", "4")
    # in this process memory may have been given back since the beginning, and a difference be below 0
    ratios = re.findall(r"sparse / dense: (.*) (-?[\d.]+) \(", "\n".join(lines))
    found = {words: float(ratio) for words, ratio in ratios}
    assert list(found)[2:] == ["peak", "tensors", "peak with the fit's end"]
    # values, gradients and momentum as in dense training, and three indices for each
    assert found["tensors"] == pytest.approx(0.2 * 2, abs=0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_a_whole_program_is_measured_beside_a_dense_one(printed, monkeypatch):
    runs = []

    def program(command, **options):
        runs.append([str(part) for part in command[2:]])
        return SimpleNamespace(stdout="40.0\n" if "dense" in command else "10.0\n")

    monkeypatch.setattr(benchmarks.subprocess, "run", program)
    lines = printed("program", "--width", "32", "--steps", "2", "--sparsities", "0.9", "--storages", "masked,sparse")
    assert runs == [[kind, sparsity, "32", "2", "2", "1"] for kind, sparsity in KINDS]
    assert lines[1:] == [
        "dense: peak 40 MB above torch and Lightning",
        "0.9    masked  peak / dense: 0.250 (0.250 to 0.250)",
        "0.9    sparse  peak / dense: 0.250 (0.250 to 0.250)",
    ]


@pytest.mark.parametrize(("kind", "sparsity"), KINDS)
def test_the_whole_program_trains_and_writes_a_checkpoint(kind, sparsity, tmp_path):
    before = program.peak()
    program.train(kind, float(sparsity), width=12, batch=4, steps=2, folder=str(tmp_path))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert program.peak() > 0.9 * before > 1  # the kernel counts pages of several threads roughly
