import json

import pytest
import torch
import yaml

from lightning_sparse import SparseCallback, recipes
from lightning_sparse.cli import run
from lightning_sparse.data import MNISTDataModule, TensorImages

NETS = ["lenet300-mnist", "lenet5-mnist", "lenet300-digits"]
NAMES = [f"{method}-{net}" for method in ("dense", "dst", "dfbst", "autosparse", "str") for net in NETS]
NAMES += [f"{method}-lstm-{size}-mnist" for method in ("dense", "dst") for size in "ab"]


def read(name):
    return yaml.safe_load(recipes.path(name).read_text())


@pytest.fixture
def fake_mnist(monkeypatch):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        images = TensorImages(torch.rand(200, 1, 28, 28, generator=generator), torch.arange(200) % 10)
        self.train = self.val = self.test = images

    monkeypatch.setattr(MNISTDataModule, "prepare_data", lambda self: None)
    monkeypatch.setattr(MNISTDataModule, "setup", setup)


def test_the_recipes_are_these():
    assert recipes.names() == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_recipe_builds_and_trains_two_batches(name, fake_mnist, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])
    options = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = run(["fit", "--recipe", name, *options, "--trainer.enable_model_summary=false"])
    assert cli.trainer.global_step == 2
    methods = [type(c).__name__.lower() for c in cli.trainer.callbacks if isinstance(c, SparseCallback)]
    assert methods == ([] if name.startswith("dense") else [name.split("-")[0]])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("dense")])
def test_a_recipe_is_its_dense_twins_but_for_the_method(name):
    method, net = name.split("-", 1)
    sparse, dense = read(name), read(f"dense-{net}")
    assert len(sparse["trainer"].pop("callbacks")) == 1
    if method in ("autosparse", "str"):  # weight decay drives them
        for recipe in (sparse, dense):
            recipe["model"]["init_args"]["optimizer"]["init_args"].pop("weight_decay")
    assert sparse == dense


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_by_saying_what_it_is(name):
    first, second, *_ = recipes.path(name).read_text().splitlines()
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert recipes.summary(name) == first[2:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dst-lenet300-mnist", {"class_path": "lightning_sparse.DST", "init_args": {"alpha": 5e-4}}),
        ("dfbst-lenet5-mnist", {"class_path": "lightning_sparse.DFBST", "init_args": {"alpha": 5e-4, "beta": 0.01}}),
        ("dst-lstm-b-mnist", {"class_path": "lightning_sparse.DST", "init_args": {"alpha": 1e-3, "reset_above": None}}),
    ],
)
def test_methods_have_the_papers_values(name, expected):
    assert read(name)["trainer"]["callbacks"] == [expected]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("mnist")])
def test_mnist_is_trained_as_in_the_papers(name):
    recipe = read(name)
    optimizer = recipe["model"]["init_args"]["optimizer"]
    lstm = "lstm" in name
    assert recipe["trainer"]["max_epochs"] == 20
    assert recipe["data"]["init_args"]["batch_size"] == (100 if lstm else 64)
    assert optimizer["class_path"] == ("torch.optim.Adam" if lstm else "torch.optim.SGD")
    assert optimizer["init_args"]["lr"] == (0.001 if lstm else 0.01)
    assert optimizer["init_args"].get("momentum", 0.9) == 0.9
    assert json.dumps(recipe)  # plain values only


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(ValueError, match=r"no recipe is named 'dst-lenet30-mnist'. Near: dst-lenet300-mnist"):
        recipes.path("dst-lenet30-mnist")
