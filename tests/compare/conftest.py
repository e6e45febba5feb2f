import subprocess
from types import SimpleNamespace

import pytest
from processes import started

from lightning_sparse.compare import runs


@pytest.fixture
def trainings_start_at_once(monkeypatch):
    """Give trainings processes that need no seconds for the imports; ``make demo`` runs real programs."""
    stand_in = SimpleNamespace(Popen=started, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(runs, "subprocess", stand_in)
