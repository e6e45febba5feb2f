"""Odd values of any argument are refused in words that name it: nothing is taken by chance, nothing fails inside."""

import inspect
import re

import pytest
import torch
from helpers import ROUNDS, SETTINGS
from torch import nn

import lightning_sparse
from lightning_sparse import RigL, SparsityMonitor, load_dense
from lightning_sparse.compat import checks
from lightning_sparse.export import (
    CSRConv2d,
    CSRLinear,
    benchmark,
    compact,
    load_sparse,
    save_sparse,
    to_csr,
    to_onnx,
    to_openvino,
)
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.storage import SparseConv2d, SparseLinear, make_dense_, make_sparse_, to_dense
from lightning_sparse.zoo.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    MNISTDataModule,
    ParallelTextDataModule,
)
from lightning_sparse.zoo.models import LeNet300, SequenceLSTM, Transformer, WarmupCosineLR, WarmupMultiStepLR

METHODS = {**SETTINGS, **ROUNDS}
ODD = {
    "object": object(),
    "bytes": b"x",
    "empty": "",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "no float32": 1e300,
    "no float": 10**400,
    "complex": 1j,
    "a tensor": torch.ones(2),
    "a set": {1},
    "a class": nn.Linear,
    "a list": [None],
    "a dict": {1: "a"},
}


@pytest.mark.parametrize("method", METHODS)
def test_no_argument_of_a_method_takes_an_odd_value(method):
    kind, good = getattr(lightning_sparse, method), METHODS[method]().arguments
    for name in inspect.signature(kind).parameters:
        for value in ODD.values():
            with pytest.raises(ValueError, match=rf"{name}.* must|{name} must|must be .*, got"):
                kind(**{**good, name: value})


NET, X, LINEAR = nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4), nn.Linear(4, 3)
OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
CALLS = {
    SparsityMonitor: ({}, ["every_n_batches", "collapse_below", "flops", "figures"]),
    SparseLinear: (
        {"in_features": 4, "out_features": 3, "nnz": 2},
        ["in_features", "out_features", "nnz", "bias", "generator", "dtype"],
    ),
    SparseConv2d: (
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "nnz": 2},
        [
            "in_channels",
            "out_channels",
            "kernel_size",
            "nnz",
            "stride",
            "padding",
            "dilation",
            "groups",
            "bias",
            "padding_mode",
            "generator",
            "dtype",
        ],
    ),
    make_sparse_: ({"layer": LINEAR, "positions": torch.tensor([0, 3])}, ["positions"]),
    to_dense: ({"module": NET}, ["module"]),
    load_dense: ({"checkpoint": {"state_dict": {}}}, ["checkpoint", "limit"]),
    select_parameters: ({"module": NET}, ["module", "include", "exclude"]),
    CSRLinear: ({"linear": LINEAR}, ["linear"]),
    CSRConv2d: ({"conv": nn.Conv2d(2, 3, 1)}, ["conv"]),
    to_csr: ({"module": NET}, ["module", "min_sparsity"]),
    compact: ({"module": NET, "example_input": X}, ["module", "select", "tolerance"]),
    to_onnx: (
        {"module": NET, "path": "n.onnx", "example_input": X},
        ["module", "path", "dynamic_batch", "tolerance", "sparse_weights"],
    ),
    to_openvino: (
        {"module": NET, "example_input": X},
        ["module", "calibration", "path", "min_sparsity", "dynamic_batch", "tolerance"],
    ),
    benchmark: (
        {"module": NET, "example_input": X},
        ["module", "batch_sizes", "rounds", "min_sparsity", "memory"],
    ),
    save_sparse: ({"state": NET, "path": "n.safetensors"}, ["state", "path"]),
    load_sparse: ({"path": "n.safetensors"}, ["path", "limit"]),
    LeNet300: (
        {},
        [
            "inputs",
            "hidden",
            "classes",
            "optimizer",
            "lr_scheduler",
            "lr_interval",
            "label_smoothing",
            "decay_norm_and_bias",
            "top5",
        ],
    ),
    WarmupMultiStepLR: ({"optimizer": OPTIMIZER, "milestones": [1, 2]}, ["milestones", "gamma", "warmup"]),
    WarmupCosineLR: ({"optimizer": OPTIMIZER, "epochs": 2}, ["epochs", "warmup"]),
    SequenceLSTM: ({}, ["inputs", "hidden", "layers", "classes"]),
    Transformer: (
        {"vocabulary": 20, "width": 8, "heads": 2, "layers": 1, "hidden": 8},
        ["vocabulary", "width", "layers", "heads", "hidden", "dropout", "padding", "begin", "end", "label_smoothing"],
    ),
    DigitsDataModule: ({}, ["batch_size", "seed", "split_seed", "eval_batch_size"]),
    ImageFolderDataModule: ({}, ["data_dir", "train", "test", "batch_size", "mean", "std", "padding", "flip"]),
    ImageNetDataModule: ({}, ["data_dir", "batch_size", "size", "resize", "workers", "seed"]),
    ParallelTextDataModule: ({}, ["data_dir", "source", "val", "vocabulary", "vocabulary_size", "max_tokens", "seed"]),
    MNISTDataModule: ({}, ["batch_size", "download", "normalise", "val_from_train", "seed", "eval_batch_size"]),
    CIFAR10DataModule: ({}, ["batch_size", "download", "padding", "flip", "rotation", "val_from_train", "seed"]),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_argument_of_a_function_or_class_takes_an_odd_value(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, names = CALLS[call]
    for name in names:
        for kind, value in ODD.items():
            if (name, kind) in {("optimizer", "a class"), ("lr_scheduler", "a class")}:
                continue  # may be what makes one
            if kind == "empty" and name in ("data_dir", "vocabulary"):
                continue  # here
            with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.* must") as caught:
                call(**{**good, name: value})
            assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("value", ["3", True, 1.0, -1, 13])
def test_a_number_of_nonzeros_is_whole_and_fits(value):
    with pytest.raises(ValueError, match=rf"nnz must be .* got {re.escape(repr(value))}"):
        SparseLinear(4, 3, nnz=value)


@pytest.mark.parametrize("positions", [[0, 3], [3, 0], [1, 1], [-1, 2], [0, 12]])
def test_positions_of_a_layer_are_ascending_different_and_in_it(positions):
    if positions == [0, 3]:
        assert SparseLinear.from_dense(nn.Linear(4, 3), torch.tensor(positions)).nnz == 2
        return
    with pytest.raises(ValueError, match=r"positions must be (ascending and different|from 0 to 11)"):
        SparseLinear.from_dense(nn.Linear(4, 3), torch.tensor(positions))


def test_layers_are_refused_in_what_no_product_computes_in():
    with pytest.raises(ValueError, match=r"linear must be in float32 or float64, got torch\.bfloat16\. Give linear"):
        CSRLinear(nn.Linear(4, 3).bfloat16())
    with pytest.raises(ValueError, match=r"layer must have a floating-point weight, got one of torch\.complex128"):
        SparseLinear.from_dense(nn.Linear(4, 3, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype, or None, got torch\.complex128"):
        SparseLinear(4, 3, 2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="layer must be a SparseLinear or SparseConv2d, got one of type Linear"):
        make_dense_(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="groups must divide in_channels=4 and out_channels=6, got 4"):
        SparseConv2d(4, 6, 3, 2, groups=4)


def test_an_unknown_backend_is_refused_where_it_is_asked_for():
    layer = SparseLinear(4, 3, 2)
    layer.backend = "cuda"
    with pytest.raises(ValueError, match=r"backend must be one of .*'numba', 'dense'\], or None .*, got 'cuda'"):
        layer(torch.ones(2, 4))


def test_seeds_are_what_a_generator_takes():
    RigL(0.9, seed=2**64 - 1).generator.manual_seed(2**64 - 1)
    with pytest.raises(ValueError, match=r"seed must be an integer of at most 18446744073709551615, got"):
        RigL(0.9, seed=2**64)


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_that_does():
    module = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(4, 3)), "head": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"\['enocder\.\*'\] match none\. Did you mean 'encoder\.\*'\?"):
        select_parameters(module, include=["enocder.*"])
    with pytest.raises(ValueError, match=r"\['\*\.haed\.weight'\] match none\. Did you mean"):
        select_parameters(module, exclude=["*.haed.weight"])
    with pytest.raises(ValueError, match=r"\['zzz'\] match none\. Biases"):
        select_parameters(module, exclude=["zzz"])


def test_a_file_is_written_into_a_folder_that_exists_and_not_over_one(tmp_path):
    for path in (tmp_path / "nowhere" / "file", str(tmp_path / "nowhere" / "file")):
        with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got '.*file'\. Make the"):
            save_sparse(NET, path)
    with pytest.raises(ValueError, match=r"path must be the path of a file, got the folder '.*'\. Add the name"):
        save_sparse(NET, tmp_path)
    with pytest.raises(ValueError, match=r"state must hold tensors by name, got the keys \[1\]"):
        save_sparse({1: torch.ones(2)}, tmp_path / "file")


def test_large_numbers_are_told_from_infinite_ones():
    checks.finite("", alpha=3e38)
    with pytest.raises(ValueError, match=r"alpha must be a finite number, got 1e\+300, which is infinite in float32\."):
        checks.finite("", alpha=1e300)
