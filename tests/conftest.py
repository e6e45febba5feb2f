import gc
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import started

from lightning_sparse.compare import runs
from lightning_sparse.kernels import dispatch

collect_ignore_glob = ["*_script.py"]  # programs that tests start

# How quickly examples are made and tried says something about the machine alone.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Leave what imports and collection have made, some million objects, out of every search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """Take back what ``seed_everything`` and ``Trainer(deterministic=True)`` leave, which later tests would find."""
    yield
    torch.use_deterministic_algorithms(False)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(params=["torch", "numba"])
def kernel(request, monkeypatch):
    """Run a test with each set of kernels."""
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", request.param)
    dispatch.module.cache_clear()
    yield request.param
    monkeypatch.undo()
    dispatch.module.cache_clear()


@pytest.fixture
def trainings_start_at_once(monkeypatch):
    """Give trainings processes that need no seconds for the imports; ``make demo`` runs real programs."""
    stand_in = SimpleNamespace(Popen=started, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(runs, "subprocess", stand_in)
