"""The documentation runs: Python blocks page by page; every card, method and module has its place."""

import csv
import inspect
import json
import os
import re
import statistics
from collections import defaultdict
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse
from lightning_sparse import SparseCallback

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "docs" / "methods").glob("*.md"))
PUBLIC = {name: getattr(lightning_sparse, name) for name in lightning_sparse.__all__}
KINDS = {kind for kind in PUBLIC.values() if isinstance(kind, type) and issubclass(kind, SparseCallback)}
METHODS = sorted(kind.__name__ for kind in KINDS - {SparseCallback})  # GSE is a second name of one of them
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


class MyModule(pl.LightningModule):
    """What a reader has: an encoder and a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.encoder(x).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class MyData(pl.LightningDataModule):
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.argmax(1) % 4), batch_size=8)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder and an environment of its own; no process group left behind by strategy="ddp"."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    return list(SYBIL.parse(page).examples()) if "```python" in page.read_text() else []


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=relative)
def test_python_blocks_of_a_page_run_one_after_the_other(page):
    document = SYBIL.parse(page)
    document.namespace.update(
        __name__="page", MyModule=MyModule, AnyLightningModule=MyModule, datamodule=MyData(), __file__=str(page)
    )
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("card", CARDS, ids=relative)
def test_a_card_has_its_parts_in_order(card):
    text = card.read_text()
    parts = ["# ", "from lightning_sparse import", "**When to use.**", "**Formula.**"]
    parts += ["| argument | start with | effect |", "## Differences from the paper", "## Our numbers", "../results.md"]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_every_method_has_a_card_and_the_cards_name_real_arguments():
    named = set()
    for card in CARDS:
        method = re.search(r"`from lightning_sparse import (\w+)`", card.read_text())[1]
        named.add(method)
        table = card.read_text().split("| argument |")[1].split("\n\n")[0]
        cells = [row.split("|")[1] for row in table.splitlines()[2:]]
        arguments = {name for cell in cells if "optimizer's" not in cell for name in re.findall(r"`(\w+)`", cell)}
        known = set(inspect.signature(getattr(lightning_sparse, method)).parameters)
        assert arguments <= known, f"{card.name}: {arguments - known}"
    assert named == set(METHODS)


def test_every_module_of_the_package_is_in_the_reference():
    package = ROOT / "lightning_sparse"
    modules = {path.stem for path in package.glob("*.py")}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {name for name in modules if not name.startswith("_")} - {"methods"}  # each is at the top level
    documented = {
        directive
        for page in (ROOT / "docs" / "api").glob("*.md")
        for directive in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    }
    missing = {f"lightning_sparse.{name}" for name in modules} - documented
    assert not missing, f"Add '::: NAME' to a page of docs/api for {sorted(missing)}."
    assert "lightning_sparse" in documented


def test_the_readme_quotes_what_the_notebook_printed():
    readme, notebook = (ROOT / "README.md").read_text(), ROOT / "notebooks" / "8-prune-a-trained-network.ipynb"
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", ())]
    printed = "".join(line for output in outputs for line in output.get("text", ()))
    dense, sparse = re.search(r"shrinks from ([\d,]+) to (\d+) KiB", readme).groups()
    assert re.search(rf"dense +{dense.replace(',', '')} KiB", printed)
    assert re.search(rf"save_sparse +{sparse} KiB", printed)
    (faster,) = re.search(r"128 images ([\d.]+) times", readme).groups()
    assert re.search(rf"batch 128: .*, {faster} times as fast", printed)


#: how many seeds there are of a comparison that has not three
SEEDS = {"mnist-lenet5.csv": 2}


def comparison(file):
    """Return the accuracies in percent of the runs that ``compare`` wrote, by method and sparsity."""
    runs = defaultdict(list)
    for row in csv.DictReader((ROOT / "docs" / "results" / file).open()):
        runs[row["method"], row["sparsity"]].append(100 * float(row["val_acc"]))
    assert {len(seeds) for seeds in runs.values()} == {SEEDS.get(file, 3)}
    return runs


@pytest.mark.parametrize("file", [path.name for path in sorted((ROOT / "docs" / "results").glob("*.csv"))])
def test_the_accuracies_of_a_comparison_are_those_of_its_runs(file):
    page = (ROOT / "docs" / "results.md").read_text()
    table = page.split(f"(results/{file})")[1].split("\n| method | ")[1]
    head, _, *lines = table.split("\n\n")[0].splitlines()
    told = {}
    for line in lines:
        method, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        told |= {(method, sparsity): cell for sparsity, cell in zip(head.strip(" |").split(" | "), cells, strict=True)}
    runs = {run: f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for run, x in comparison(file).items()}
    dense = runs.pop(("dense", ""))
    assert told == runs
    assert f"Dense training has {dense}." in page


def test_the_readme_quotes_accuracies_of_the_comparison():
    table = (ROOT / "README.md").read_text().split("## Which method")[1].split("\n\n")[1]
    head, _, *lines = table.splitlines()
    runs = comparison("mnist-lenet300.csv")
    means = {(run[0].split()[0], run[1]): f"{statistics.mean(x):.2f}" for run, x in runs.items()}
    sparsities = [f"{int(percent) / 100:g}" for percent in re.findall(r"(\d+) % zeros", head)]
    quoted = 0
    for line in lines:
        (method,) = re.findall(r"`(\w+)`", line.split("|")[2])
        cells = [cell.strip() for cell in line.strip("|").split("|")[2:]]
        if any(cells):
            assert cells == [means[method, sparsity] for sparsity in sparsities]
            quoted += 1
    assert quoted >= 10


def test_the_accuracies_with_a_target_are_those_of_the_runs():
    runs = defaultdict(list)
    for row in csv.DictReader((ROOT / "docs" / "targets.csv").open()):
        runs[row["network"], float(row["setting"]), row["optimizer"], row["method"]].append(float(row["accuracy"]))
    page = (ROOT / "docs" / "guides" / "targets.md").read_text()
    (head,) = re.findall(r"^\| network \| sparsity \| optimizer \| (GMP .*) \|\n\|[-|]+\n\| \w+ \| 0.5", page, re.M)
    told = {}
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| (SGD|Adam) \| (.*±.*) \|$", page, re.M)
    for network, sparsity, optimizer, cells in rows:
        for method, cell in zip(head.split(" | "), cells.split(" | "), strict=True):
            told[network, float(sparsity), optimizer, method] = cell
    assert told == {run: f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for run, x in runs.items()}
    assert {len(seeds) for seeds in runs.values()} == {3}


def test_the_accuracies_with_more_seeds_are_those_of_the_runs():
    runs = defaultdict(list)
    for row in csv.DictReader((ROOT / "docs" / "targets-more-seeds.csv").open()):
        runs[row["optimizer"], row["method"]].append(float(row["accuracy"]))
    page = (ROOT / "docs" / "guides" / "targets.md").read_text()
    told = {f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in runs.values() if len(x) == 9}
    assert len(told) == 4
    assert all(cell in page for cell in told)


def test_the_accuracies_of_tuning_by_hand_are_those_of_the_runs():
    runs, rows = defaultdict(list), [*csv.DictReader((ROOT / "docs" / "targets-by-hand.csv").open())]
    for tuned, targeted in zip(rows[::2], rows[1::2], strict=True):  # of the same density
        assert float(targeted["density"]) == pytest.approx(float(tuned["density"]), abs=1e-4)
        run = tuned["network"], tuned["optimizer"], targeted["method"]
        runs[run].append([f"{float(row['accuracy']):.2f}" for row in (tuned, targeted)])
    page = (ROOT / "docs" / "guides" / "targets.md").read_text()
    told = re.findall(r"^\| (\w+) \| (SGD|Adam) \| (\w+) \| [\d.]+ to [\d.]+ \| (.*) \| (.*) \|$", page, re.M)
    columns = {run: [", ".join(cells) for cells in zip(*found, strict=True)] for run, found in runs.items()}
    assert {row[:3]: [*row[3:]] for row in told} == columns


def test_the_accuracies_with_a_pattern_are_those_of_the_runs():
    runs = defaultdict(list)
    for row in csv.DictReader((ROOT / "docs" / "patterns.csv").open()):
        kind = "N:M" if ":" in row["pattern"] and not row["pattern"].startswith("block") else row["pattern"]
        run = row["network"], f"{float(row['density']):g}", row["method"], kind
        runs[run].append(float(row["accuracy"]))
    page = (ROOT / "docs" / "guides" / "patterns.md").read_text()
    (head,) = re.findall(r"^\| network \| density \| method \| (.*) \|$", page, re.M)
    told = {}
    for *run, cells in re.findall(r"^\| (\w+) \| ([\d.]+) \| (\w+) \| (.*) \|$", page, re.M):
        for kind, cell in zip(head.split(" | "), cells.split(" | "), strict=True):
            told |= {(*run, kind): cell} if cell.strip() else {}
    assert told == {run: f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for run, x in runs.items()}
    assert {len(seeds) for seeds in runs.values()} == {3}
