"""A callback belongs in the Trainers of both of Lightning's packages."""

from pathlib import Path

import pytest
from processes import run_python

from lightning_sparse.compat import lightning

SCRIPT = Path(__file__).parents[1] / "other_package_script.py"


@pytest.mark.parametrize(("mode", "backend"), [("both", "pytorch_lightning"), ("later", None)])
def test_the_trainer_of_either_package_trains(mode, backend):
    pytest.importorskip("pytorch_lightning")
    variables = {"LIGHTNING_SPARSE_BACKEND": backend} if backend else {}
    assert run_python(SCRIPT, mode, **variables).count("sparsity 0.") == (3 if mode == "later" else 2)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_BACKEND", "jax")
    with pytest.raises(ImportError, match=r"LIGHTNING_SPARSE_BACKEND must be one of .*got 'jax'"):
        lightning._choose()
