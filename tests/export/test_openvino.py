"""OpenVINO's cases run in a process of their own: a process that has run OpenVINO should not fork any more."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python


@pytest.mark.skipif(not (find_spec("openvino") and find_spec("nncf")), reason="the extra openvino is not installed")
def test_the_cases_of_openvino_pass():
    cases = Path(__file__).with_name("openvino_cases.py")
    printed = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", cases)
    assert " passed" in printed
    assert "skipped" not in printed
