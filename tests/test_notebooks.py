import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    return read


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_committed_notebooks_ran_whole_and_in_order(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_committed_notebooks_show_no_errors_or_warnings(notebook):
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


def test_committed_notebooks_hold_nothing_that_differs_from_run_to_run(notebook):
    assert notebook.metadata == {"language_info": {"name": "python"}}
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


def test_links_of_notebooks_lead_to_files(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert [link for link in links if "://" not in link and not (ROOT / "notebooks" / link).is_file()] == []
