"""What a release says of itself agrees: version, addresses, links that a package index makes absolute."""

import re
from pathlib import Path

import pytest
import yaml

import lightning_sparse

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


def test_one_version_is_told_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (cited["version"], str(cited["date-released"])) == latest.groups()
    assert lightning_sparse.__version__ == latest[1]


def test_one_address_is_told_everywhere():
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    places = ["CITATION.cff", ".mkdocs.yml", "pyproject.toml"]
    hosts = r"https://(?:raw\.githubusercontent\.com|github\.com)/([\w-]+)/([\w-]+)"
    told = {place: set(re.findall(hosts, (ROOT / place).read_text())) for place in places}
    assert told == {place: {(owner, name)} for place in places}


def test_an_index_shows_links_of_the_readme_that_lead_into_the_repository():
    text = (ROOT / "README.md").read_text()
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"].replace("$HFPR_VERSION", "1.2"), text)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) > 50
    pages, pictures = (
        f"{REPOSITORY}/blob/v1.2/",
        f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/v1.2/",
    )
    for picture, link in links:
        assert link.startswith(pictures if picture else pages), link
        assert (ROOT / link.removeprefix(pages).removeprefix(pictures).partition("#")[0]).is_file(), link
