"""What the package asks to be installed with it."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = ["lightning", "pytorch-lightning"]


def requirement(package):
    found = {Requirement(text) for text in re.findall(rf'"({package}[>=!<~][^"]*)"', PROJECT)}
    (only,) = found
    return only.specifier


@pytest.mark.parametrize("package", PACKAGES)
def test_the_two_malicious_releases_of_lightning_are_refused_and_no_others(package):
    specifier = requirement(package)
    assert not {"2.4.0", "2.6.2", "2.6.3"} & set(specifier.filter(["2.4.0", "2.6.2", "2.6.3"]))
    good = ["2.5.0", "2.5.6", "2.6.1", "2.6.4", "2.6.6", "2.7.0", "3.0.0"]
    assert list(specifier.filter(good)) == good


def test_the_page_on_installation_recommends_a_version_and_names_the_ones_refused():
    page = (Path(__file__).parents[1] / "docs" / "install.md").read_text(encoding="utf-8")
    assert "Take version 2.6.6 or newer of either." in page
    assert "Never install 2.6.2 and 2.6.3" in page
