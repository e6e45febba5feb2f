"""LayerBackends: how each truly sparse layer computes."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from stored import measured

import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse.layers.sparse import SparseLinear
from lightning_sparse.storage.layer_backends import LayerBackends


def weights(*names):
    return [SimpleNamespace(name=name, sparse=SparseLinear(4, 3, 2)) for name in names]


def trainer():
    return SimpleNamespace(
        is_global_zero=True,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(broadcast=lambda x: x),
    )


def test_a_checkpoint_decides_for_its_layers_and_nobody_for_the_others(monkeypatch):
    monkeypatch.setattr(layer_backends.dispatch, "wanted", lambda: "auto")
    here, found = weights("a.weight", "b.weight"), LayerBackends()
    found.load_state_dict({"weights": {"a.weight": {}}, "backends": {"a.weight": "torch"}})
    found.settle(here)
    assert found.chosen == {"a.weight": "torch"}
    assert here[0].sparse.backend == "torch"
    assert not found.known


def test_what_is_asked_for_decides_for_all(monkeypatch):
    monkeypatch.setattr(layer_backends.dispatch, "wanted", lambda: "torch")
    monkeypatch.setattr(layer_backends, "backends", lambda layer: ["torch"])
    here, found = weights("a.weight", "b.weight"), LayerBackends()
    found.settle(here)
    assert found.chosen == {"a.weight": "torch", "b.weight": "torch"}
    assert found.known


def test_a_backend_that_is_not_here_is_told_of_and_measured_anew(monkeypatch):
    monkeypatch.setattr(layer_backends.dispatch, "wanted", lambda: "auto")
    here, found = weights("a.weight"), LayerBackends()
    found.load_state_dict({"weights": {"a.weight": {}}, "backends": {"a.weight": "another"}})
    with pytest.warns(UserWarning, match="the backend 'another' for a.weight, which is not available here"):
        found.settle(here)
    assert found.chosen == {}


def test_the_first_batch_chooses_for_layers_of_which_nothing_is_known(monkeypatch, caplog):
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))
    here, found = weights("a.weight", "b.weight"), LayerBackends()
    found.chosen = {"a.weight": "numba"}
    noted = found.note_inputs(here)
    for weight in here:
        weight.sparse(torch.rand(5, 4))
    assert set(noted.found) == {"b.weight"}
    with caplog.at_level(logging.INFO):
        found.measure(here, trainer(), "sparse")
    assert found.chosen == {"a.weight": "numba", "b.weight": "torch"}
    assert found.known
    assert found.inputs is None
    assert "b.weight with torch in 0.5 of the time with dense weights" in caplog.text
    assert found.state_dict() == {"backends": found.chosen}
