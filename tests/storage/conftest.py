import pytest
from stored import measured

import lightning_sparse.storage.layer_backends as layer_backends


@pytest.fixture(autouse=True)
def quick_and_the_same_everywhere(monkeypatch):
    """No measurement decides how layers compute."""
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))
