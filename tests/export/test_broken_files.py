"""Whatever is altered in a file or a state, it is refused before anything computes with its indices."""

import copy
import json
from itertools import product

import pytest
import torch
from altered import alterations, is_csr, is_positions, unchanged
from helpers import prune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparse import load_dense
from lightning_sparse.export import CSRConv2d, CSRLinear, load_sparse, save_sparse
from lightning_sparse.storage import SparseConv2d, SparseLinear

LAYERS = {
    "CSRLinear": lambda: CSRLinear(prune(nn.Linear(6, 5), outputs=0.5)),
    "CSRConv2d": lambda: CSRConv2d(SparseConv2d(4, 6, (2, 1), nnz=9, groups=2)),
    "SparseLinear": lambda: SparseLinear(6, 5, nnz=11),
    "SparseConv2d": lambda: SparseConv2d(4, 6, (2, 1), nnz=9, groups=2),
}
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def names(layer):
    return ("crow_indices", "col_indices", "values") if "CSR" in type(layer).__name__ else ("crow", "col", "values")


@SETTINGS
@given(st.sampled_from([*LAYERS]), st.integers(0, 2), alterations(), st.booleans(), st.booleans())
def test_a_layer_loads_what_is_a_weight_and_else_stays_as_it_is(kind, part, alter, alone, assign):
    layer = LAYERS[kind]()
    state, shape, groups = layer.state_dict(), tuple(layer.shape), getattr(layer, "groups", 1)
    before, name = copy.deepcopy(state), names(layer)[part]
    weight_shape = (shape[0], shape[1] // groups) if "CSR" in kind else shape
    given_ = {**state, name: alter(state[name])}
    good = is_csr(*(given_[n] for n in names(layer)), weight_shape, groups)
    given_ = {name: given_[name]} if alone else given_
    given_ = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given_.items()}
    if not good:
        with pytest.raises(RuntimeError, match=r"must (be|have|ascend)"):
            layer.load_state_dict(given_, strict=not alone, assign=assign)
        assert unchanged(before, layer.state_dict())
        return
    layer.load_state_dict(given_, strict=not alone, assign=assign)
    assert layer.state_dict()[names(layer)[1]].dtype == torch.int32
    dense = torch.zeros(weight_shape[0], int(torch.Size(weight_shape[1:]).numel()) * groups)
    crow, col, values = (layer.state_dict()[n].tolist() for n in names(layer))
    for row in range(weight_shape[0]):
        for at in range(crow[row], crow[row + 1]):
            dense[row, col[at]] = values[at]
    x = torch.randn(3, dense.shape[1])
    if "Linear" in kind:
        assert torch.allclose(layer(x.to(layer.values.dtype)).float(), x @ dense.t() + layer.bias, atol=1e-5)


@SETTINGS
@given(st.sampled_from(["SparseLinear", "SparseConv2d"]), st.integers(0, 3), alterations())
def test_load_dense_takes_what_is_a_weight_and_refuses_all_else(kind, part, alter):
    state = LAYERS[kind]().state_dict()
    name = ("crow", "col", "values", "weight_shape")[part]
    state[name] = alter(state[name])
    shape = state["weight_shape"]
    good = isinstance(shape, torch.Tensor) and not shape.is_meta and shape.dtype in (torch.int32, torch.int64)
    good = good and shape.ndim == 1 and len(shape) > 1 and min(shape.tolist()) >= 0
    divisors = [1] if good and len(shape) == 2 else [1, 2, 3, 6]
    entries = (state["crow"], state["col"], state["values"])
    good = good and any(shape[0] % g == 0 and is_csr(*entries, shape.tolist(), g) for g in divisors)
    if good and shape.prod() < 10**6:
        assert load_dense({"state_dict": state})["weight"].count_nonzero() == state["values"].count_nonzero()
    else:
        with pytest.raises(ValueError, match=r"must|has no"):
            load_dense({"state_dict": state})


@pytest.mark.parametrize("missing", ["values", "crow", "col"])
def test_load_dense_names_the_entries_that_are_missing(missing):
    state = {f"a.{name}": x for name, x in SparseLinear(6, 5, nnz=11).state_dict().items()}
    del state[f"a.{missing}"]
    with pytest.raises(ValueError, match=rf"must hold all entries of a sparse layer, but has no a\.{missing}"):
        load_dense({"state_dict": state})


def written(path, tensors, **metadata):
    """Write a file as ``save_sparse`` does, with these things in it."""
    whole = {"format": "lightning_sparse 2", "sparse": {"weight": [20, 30]}, "tied": {}}
    whole |= {"forms": {"weight": "gaps" if "weight.gaps" in tensors else "indices"}} | metadata
    whole = {key: x if isinstance(x, str) else json.dumps(x) for key, x in whole.items() if x is not None}
    pytest.importorskip("safetensors.torch").save_file(tensors, path, metadata=whole)
    return path


INDICES, VALUES = torch.tensor([0, 3, 77, 599], dtype=torch.int32), torch.tensor([1.0, 2.0, 3.0, 4.0])


@SETTINGS
@given(st.booleans(), alterations())
def test_load_sparse_takes_what_is_a_weight_and_refuses_all_else(tmp_path, of_indices, alter):
    indices, values = (alter(INDICES), VALUES) if of_indices else (INDICES, alter(VALUES))
    parts = {"weight.indices": indices, "weight.values": values}
    parts = {name: x.clone() for name, x in parts.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    path = written(tmp_path / "file", parts)
    dtypes = (torch.float32, torch.float64, *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool))
    good = len(parts) == 2 and is_positions(indices, 600) and values.shape == indices.shape and values.dtype in dtypes
    if good:
        loaded, expected = load_sparse(path)["weight"], torch.zeros(600, dtype=values.dtype)
        for at, value in zip(indices.tolist(), values.tolist(), strict=True):
            expected[at] = value
        assert torch.equal(loaded.flatten(), expected)
    else:
        with pytest.raises(ValueError, match=r"path must be a file of save_sparse, got '.*file': .*load_dense\.$"):
            load_sparse(path)


GAPS = torch.tensor([0, 2, 73, 255, 255, 11], dtype=torch.uint8)


@SETTINGS
@given(alterations(), st.booleans())
def test_load_sparse_takes_gaps_that_end_within_the_weight_and_refuses_all_else(tmp_path, alter, bytes_alone):
    coded = alter(GAPS)
    coded = coded.to(torch.uint8) if bytes_alone and isinstance(coded, torch.Tensor) and not coded.is_meta else coded
    parts = {"weight.gaps": coded.clone()} if isinstance(coded, torch.Tensor) and not coded.is_meta else {}
    path = written(tmp_path / "file", {**parts, "weight.values": VALUES}, forms={"weight": "gaps"})
    expected, values = [], VALUES.tolist()
    good = bool(parts) and coded.dtype == torch.uint8 and coded.ndim == 1
    for byte in coded.tolist() if good else ():  # as the format says it
        expected += [0.0] * byte if byte == 255 else [0.0] * byte + [values.pop(0) if values else None]
    if good and not values and None not in expected and len(expected) <= 600:
        assert load_sparse(path)["weight"].flatten().tolist() == expected + [0.0] * (600 - len(expected))
        return
    with pytest.raises(ValueError, match=r"path must be a file of save_sparse, got '.*file': .*load_dense\.$"):
        load_sparse(path)


@pytest.mark.parametrize(
    "header",
    [
        *({"sparse": x} for x in ({"weight": [20, -30]}, {"weight": [20, 3.5]}, {"weight": 600}, {"weight": None})),
        *({"sparse": x} for x in ([], "no JSON", "[" * 10**5, None, {"weight": [20, True]}, {"weight": ["20", "30"]})),
        *({"sparse": x} for x in ({"weight": [20, 29]}, {"weight": [2**62, 2**62]}, {"weight": [0, 2**70]})),
        *({"sparse": x} for x in ({"weight": [10**5, 10**5]}, {"other": [20, 30]}, {"weight": [20, 30], "b": [3]})),
        *({"tied": x} for x in ({"a": "b"}, {"a": 1}, [], "no JSON", None, {"bias": "weight"}, {"weight": "bias"})),
        *({"forms": x} for x in ({"weight": "bits"}, {"weight": 1}, {}, {"weight": "indices", "b": "gaps"}, [], None)),
        {"format": "lightning_sparse 3"},
    ],
    ids=lambda header: str(header)[:60],
)
def test_load_sparse_refuses_a_header_that_is_altered(tmp_path, header):
    tensors = {"weight.indices": INDICES, "weight.values": VALUES, "bias": torch.ones(3)}
    assert load_sparse(written(tmp_path / "file", tensors)).keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match=r"path must be a file of save_sparse, got '.*file': .*load_dense\.$"):
        load_sparse(written(tmp_path / "file", tensors, **header))


def test_a_file_cut_anywhere_or_with_a_byte_changed_in_its_header_is_refused_or_as_it_was(tmp_path):
    weight = torch.zeros(20, 30)
    weight.view(-1)[INDICES.long()] = VALUES
    save_sparse({"weight": weight}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    changed = [whole[:at] + bytes([byte]) + whole[at + 1 :] for at, byte in product(range(0, header, 3), (0, 57, 255))]
    for content in [*(whole[:at] for at in range(0, len(whole), 5)), *changed]:
        (tmp_path / "file").write_bytes(content)
        try:
            loaded = load_sparse(tmp_path / "file")
        except ValueError as error:
            assert "path must be a file of save_sparse" in str(error)  # noqa: PT017
        else:
            assert [x.count_nonzero() for x in loaded.values()] == [4]


def test_what_a_file_may_ask_for_has_a_limit_that_can_be_raised(tmp_path):
    state = SparseLinear(300, 200, nnz=11).state_dict()
    path = written(
        tmp_path / "file", {"weight.indices": INDICES, "weight.values": VALUES}, sparse={"weight": [300, 200]}
    )
    for load in (
        lambda limit: load_sparse(path, limit=limit),
        lambda limit: load_dense({"state_dict": state}, limit=limit),
    ):
        assert load(240_000)["weight"].count_nonzero() == load(None)["weight"].count_nonzero()
        with pytest.raises(ValueError, match=r"must take no more than limit=239999 bytes, got 240000 .* give limit="):
            load(239_999)
        with pytest.raises(ValueError, match=r"limit must be an integer of at least 0, got 'all'"):
            load("all")
    huge = written(
        tmp_path / "file", {"weight.indices": INDICES, "weight.values": VALUES}, sparse={"weight": [10**6, 10**6]}
    )
    with pytest.raises(ValueError, match=r"no more than limit=1073741824 bytes, got 4000000000000"):
        load_sparse(huge)
    state["weight_shape"][1] = 2**31 - 1
    with pytest.raises(ValueError, match=r"no more than limit=1073741824 bytes"):
        load_dense({"state_dict": state})
