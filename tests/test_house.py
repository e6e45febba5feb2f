"""The house: which room may import from which, and that imports go down only."""

import ast
from pathlib import Path

import lightning_sparse

#: from the ground floor up; a room imports from those before it
FLOORS = (
    "compat",
    "kernels",
    "rules",
    "layers",
    "accounting",
    "weights",
    "trainer",
    "storage",
    "families",
    "methods",
    "export",
    "zoo",
    "monitor",
    "__init__",
    "report",
    "compare",
    "completion",
    "cli",
    "__main__",
    "bench",
)
ROOT = Path(lightning_sparse.__file__).parent


def imported(file):
    """Yield the rooms that a file imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_sparse":
            yield from (alias.name if alias.name in FLOORS else "__init__" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_sparse."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ((*name, "__init__")[1] for name in names if name[0] == "lightning_sparse")


def room(file):
    return file.relative_to(ROOT).with_suffix("").parts[0]


def test_imports_go_down_only():
    arrows = {(room(file), target) for file in ROOT.rglob("*.py") for target in imported(file)}
    assert not {(a, b) for a, b in arrows if FLOORS.index(b) > FLOORS.index(a)}


def test_every_room_is_on_a_floor():
    assert {room(file) for file in ROOT.rglob("*.py")} == set(FLOORS)


def test_nothing_imports_the_benchmarks():
    assert not [file for file in ROOT.rglob("*.py") if room(file) != "bench" and "bench" in set(imported(file))]
