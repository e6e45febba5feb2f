"""All recipes are built and train two batches of random data; what is made smaller for that is said at ``REDUCED``."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import lightning_sparse
from lightning_sparse import SparseCallback
from lightning_sparse.cli import run
from lightning_sparse.zoo import data, recipes
from lightning_sparse.zoo.data.text import Sentences, TranslationBatches

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
NETS = ["lenet300-mnist", "lenet5-mnist", "lenet300-digits"]
WHOLE = [f"{method}-{net}" for method in ("dense", "dst", "dfbst", "autosparse", "str") for net in NETS]
WHOLE += [f"{method}-lstm-{size}-mnist" for method in ("dense", "dst") for size in "ab"]
NETWORKS = [name for name in recipes.names() if "/" in name and not recipes.is_add_on(name)]
METHODS = [name for name in recipes.names() if "/" in name and recipes.is_add_on(name)]

# One core trains these in seconds: narrow networks, and small images where the network takes any size.
REDUCED = {
    "dense-lenet300-mnist": ["--data.batch_size=100"],
    "autosparse/mobilenetv1-imagenet": ["--model.width=0.25"],
    "autosparse/transformer-wmt14": ["--model.width=32", "--model.hidden=64", "--model.vocabulary=100"],
    "dst/wrn16-8-cifar10": ["--model.widen=1"],
    "dst/vgg16-cifar10": ["--model.width=0.125"],
    "ggr/mobilenetv2-cifar100": ["--model.width=0.25"],
    "ggr/mobilenetv2-tinyimagenet": ["--model.width=0.25"],
    "ggr/vgg16-tinyimagenet": ["--model.image_size=16"],
    "medst/resnet56-cifar10": ["--model.width=0.25"],
    "medst/resnet56-cifar100": ["--model.width=0.25"],
    "medst/vgg16-cifar10": ["--model.width=0.0625"],
    "medst/vgg16-cifar100": ["--model.width=0.0625"],
}
# Methods are added to one network of their paper, the quickest.
HOST = {
    "autosparse": "autosparse/mobilenetv1-imagenet",
    "dfbst": "dense-lenet300-mnist",
    "dst": "dst/vgg16-cifar10",
    "ggr": "ggr/mobilenetv2-cifar100",
    "medst": "medst/vgg16-cifar10",
}
# Two epochs of two batches have no 391 batches, and are two trainings at most.
FEWER = {
    "medst/snip": ["--trainer.callbacks.batches=1"],
    "medst/grasp": ["--trainer.callbacks.batches=1"],
    "medst/abs-grasp": ["--trainer.callbacks.batches=1"],
    "medst/lottery-ticket": ["--trainer.callbacks.rounds=1"],
}
CLASS = {"abs-grasp": "GraSP", "lottery-ticket": "LotteryTicket", "random": "RandomPruning"}
CLASS |= {"memory-efficient-dst": "MemoryEfficientDST", "ggr-set": "GGR", "ggr-rigl": "GGR"}


def read(name):
    return yaml.safe_load(recipes.path(name).read_text())


def method_of(name):
    """The settings that an add-on gives its method."""
    (callback,) = read(name)["trainer"]["callbacks+"]
    return callback["class_path"], callback.get("init_args", {})


@pytest.fixture(autouse=True)
def fake_data(monkeypatch, tmp_path):
    """Ten random items of the right shape in place of each data module's own."""

    def images(channels, size, classes, count=10):
        def setup(self, stage):
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(count, channels, size, size, generator=generator)
            self.train = self.val = self.test = data.TensorImages(pixels, torch.arange(count) * classes // count)

        return setup

    def text(self, stage):
        sentences = Sentences.collect([[[1, *range(10, 10 + length), 2] for length in range(2, 12)]])
        self.train = TranslationBatches(sentences, sentences, 60, bucketing=True)
        self.val = self.test = TranslationBatches(sentences, sentences, 60, bucketing=False)

    for module, setup in (
        (data.MNISTDataModule, images(1, 28, 10, 200)),
        (data.CIFAR10DataModule, images(3, 32, 10)),
        (data.CIFAR100DataModule, images(3, 32, 100)),
        (data.TinyImageNetDataModule, images(3, 16, 200)),
        (data.ImageFolderDataModule, images(3, 32, 10)),
        (data.ImageNetDataModule, images(3, 32, 1000)),
        (data.ParallelTextDataModule, text),
    ):
        monkeypatch.setattr(module, "setup", setup)
        monkeypatch.setattr(module, "prepare_data", lambda self: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])


def fit(*names, options=()):
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options]
    named = [part for name in names for part in ("--recipe", name)]
    return run(["fit", *named, *options, "--trainer.enable_model_summary=false"])


def small(name):
    if "transformer" in name:
        return REDUCED[name]
    options = ["--data.batch_size=5", *REDUCED.get(name, [])]
    return [*options, "--data.workers=0"] if "imagenet" in name and "tiny" not in name else options


def host(name):
    """The training that is named before this recipe, if it is an add-on."""
    if not recipes.is_add_on(name) or name == "cifar10-jpeg":
        return []
    return ["autosparse/transformer-wmt14" if name.endswith("transformer") else HOST[name.split("/")[0]]]


def options_of(name):
    """The options that a recipe's first lines name for other rows of the tables, and the values of each."""
    lines = [line[1:].strip() for line in recipes.path(name).read_text().splitlines() if line.startswith("#")]
    values = {}
    for option, first, more in re.findall(r"--([\w.]+)=([\w.-]+)((?:(?:,| and| or| to) [\d.e-]+)*)", " ".join(lines)):
        if first != "DIR":
            found = [first, *re.findall(r"[\d.e-]+", more)]
            values.setdefault(option, []).extend(number(value.rstrip(".")) for value in found)
    return values


def number(text):
    """What YAML reads, and numbers such as 1e-5 that it takes for text."""
    value = yaml.safe_load(text) if isinstance(text, str) else text
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+e-\d+", value) else value


def methods(cli):
    return [type(c).__name__ for c in cli.trainer.callbacks if isinstance(c, SparseCallback)]


# ---------------------------------------------------------------------- whole recipes


def test_the_recipes_are_these():
    assert [name for name in recipes.names() if "/" not in name] == sorted([*WHOLE, "cifar10-jpeg"])
    assert {name.split("/")[0] for name in NETWORKS} == {"autosparse", "dfbst", "dst", "ggr", "medst"}
    assert {name.split("/")[0] for name in METHODS} == set(HOST)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_recipe_builds_and_trains_two_batches(name):
    cli = fit(name, options=["--trainer.fast_dev_run=2"])
    assert cli.trainer.global_step == 2
    assert [m.lower() for m in methods(cli)] == ([] if name.startswith("dense") else [name.split("-")[0]])


@pytest.mark.parametrize("file", sorted(DOCS.parent.glob("*.yaml")), ids=lambda file: file.name)
def test_a_configuration_of_the_documentation_trains_two_batches(file):
    options = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=2", "--data.batch_size=5", "--model.width=0.125"]
    assert run(["fit", f"--config={file}", *options]).trainer.global_step == 2


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("dense")])
def test_a_recipe_is_its_dense_twins_but_for_the_method(name):
    method, net = name.split("-", 1)
    sparse, dense = read(name), read(f"dense-{net}")
    assert len(sparse["trainer"].pop("callbacks")) == 1
    if method in ("autosparse", "str"):  # weight decay drives them
        for recipe in (sparse, dense):
            recipe["model"]["init_args"]["optimizer"]["init_args"].pop("weight_decay")
    assert sparse == dense


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_begins_by_saying_what_it_is(name):
    first, second, *_ = recipes.path(name).read_text().splitlines()
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert recipes.summary(name) == first[2:]
    assert json.dumps(read(name))  # plain values only


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


ONCE_AN_EPOCH = {"drop_fraction": 0.1, "decay": "cosine", "update_every": None, "stop_at": 0.5}
EVERY_1000_STEPS = {"drop_fraction": 0.2, "update_every": 1000, "stop_at": 0.6, "distribution": "uniform"}


# What the papers say; further settings of a file are ours, and it says so.
@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("dfbst/dfbst", "DFBST", {"alpha": 5e-6, "beta": 0.1}),
        ("dfbst/dst", "DST", {"alpha": 5e-6}),
        ("dst/dst", "DST", {"alpha": 5e-6}),
        (
            "autosparse/autosparse",
            "AutoSparse",
            {"alpha": 0.75, "decay": "sigmoid_cosine", "alpha_zero_epoch": 90, "init_threshold": -5},
        ),
        (
            "autosparse/autosparse-backward",
            "AutoSparse",
            {"alpha": 1, "decay": "sigmoid_cosine", "init_threshold": -8, "backward_density": 0.5},
        ),
        (
            "autosparse/autosparse-transformer",
            "AutoSparse",
            {
                "alpha": 0.4,
                "decay": "exponential",
                "decay_rate": 1,
                "alpha_zero_epoch": 10,
                "init_threshold": -7,
            },
        ),
        ("autosparse/topkast-ga", "TopKAST", {"backward_sparsity": 0, "decay": "sigmoid_cosine", "l2": 0}),
        ("ggr/ggr", "GGR", {**ONCE_AN_EPOCH, "distribution": "erk", "random_share": 0.5}),
        ("ggr/ggr-set", "GGR", {**ONCE_AN_EPOCH, "distribution": "erk", "random_share": 1}),
        ("ggr/ggr-rigl", "GGR", {**ONCE_AN_EPOCH, "distribution": "erk", "random_share": 0}),
        ("ggr/set", "SET", {**ONCE_AN_EPOCH, "distribution": "erk"}),
        ("ggr/rigl", "RigL", {**ONCE_AN_EPOCH, "distribution": "erk"}),
        ("ggr/dsr", "DSR", {**ONCE_AN_EPOCH, "distribution": "erk"}),
        (
            "medst/memory-efficient-dst",
            "MemoryEfficientDST",
            {**EVERY_1000_STEPS, "heuristic": "grabo", "subset_multiplier": 10},
        ),
        ("medst/set", "SET", EVERY_1000_STEPS),
        ("medst/rigl", "RigL", EVERY_1000_STEPS),
        ("medst/snip", "SNIP", {"batches": 391}),
        ("medst/grasp", "GraSP", {"batches": 391}),
        ("medst/abs-grasp", "GraSP", {"batches": 391, "absolute": True}),
        ("medst/random", "RandomPruning", {"distribution": "uniform"}),
        ("medst/gmp", "GMP", {"update_every": 1000, "end_at": 0.6}),
    ],
)
def test_additions_have_the_papers_values(name, method, expected):
    kind, settings = method_of(name)
    assert kind == f"lightning_sparse.{method}"
    assert {key: settings.get(key, "missing") for key in expected} == expected


@pytest.mark.parametrize("name", [name for name in WHOLE if name.endswith("mnist")])
def test_mnist_is_trained_as_in_the_papers(name):
    recipe = read(name)
    optimizer = recipe["model"]["init_args"]["optimizer"]
    lstm = "lstm" in name
    assert recipe["trainer"]["max_epochs"] == 20
    assert recipe["data"]["init_args"]["batch_size"] == (100 if lstm else 64)
    assert optimizer["class_path"] == ("torch.optim.Adam" if lstm else "torch.optim.SGD")
    assert optimizer["init_args"]["lr"] == (0.001 if lstm else 0.01)
    assert optimizer["init_args"].get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("name", [*WHOLE, *NETWORKS])
def test_a_recipes_batch_does_not_grow_with_the_machine(name):
    assert read(name)["trainer"]["devices"] == 1


# ---------------------------------------------------------------------- networks and methods of the tables


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_builds_and_trains_two_batches(name):
    cli = fit(name, options=["--trainer.fast_dev_run=2", "--trainer.accumulate_grad_batches=1", *small(name)])
    assert cli.trainer.global_step == 2
    assert methods(cli) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_added_and_trains_two_epochs(name):
    short = name.split("/")[1]
    plain = ["--trainer.max_epochs=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    (training,) = host(name)
    cli = fit(training, name, options=[*plain, *small(training), *FEWER.get(name, [])])
    assert cli.trainer.global_step == 2 * cli.trainer.num_training_batches >= 4
    expected = CLASS.get(short, short.split("-")[0])
    assert [m.lower() for m in methods(cli)] == [expected.lower()]


OPTIONS = [name for name in recipes.names() if options_of(name)]


def test_options_are_read_from_recipes():
    assert options_of("medst/rigl") == {"trainer.callbacks.sparsity": [0.95, 0.98]}
    assert options_of("medst/vgg16-cifar100") == {"model.width": [0.375, 1]}
    assert len(OPTIONS) > 30


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_takes_the_options_that_a_recipe_names(name, capsys):
    options = {option: values[0] for option, values in options_of(name).items()}
    written = [f"--{key}={'null' if value is None else value}" for key, value in options.items()]
    with pytest.raises(SystemExit) as end:
        fit(*host(name), name, options=[*written, "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for option, value in options.items():
        found = printed
        for key in option.split("."):
            found = found[0] if isinstance(found, list) else found  # of callbacks, the method alone
            found = found["init_args"][key] if "init_args" in found else found[key]
        assert number(found) == value


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in METHODS])
def test_a_method_takes_the_values_that_its_recipe_names(name):
    kind, settings = method_of(name)
    for option, values in options_of(name).items():
        *parents, argument = option.split(".")
        if parents == ["trainer", "callbacks"]:
            for value in values:
                method = getattr(lightning_sparse, kind.split(".")[1])(**{**settings, argument: value})
                assert isinstance(method, SparseCallback)


def test_jpeg_files_take_the_place_of_cifar10():
    cli = fit("dst/vgg16-cifar10", "cifar10-jpeg", options=["--trainer.fast_dev_run=1", *small("dst/vgg16-cifar10")])
    assert type(cli.datamodule) is data.ImageFolderDataModule
    assert (cli.datamodule.batch_size, cli.datamodule.mean[0]) == (5, data.CIFAR10DataModule.mean[0])


# lr, momentum, weight decay, epochs, batch, milestones, gamma: of the papers, or ours where the file says so
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dst/vgg16-cifar10", "dst/wrn16-8-cifar10"], (0.1, 0.9, 1e-4, 160, 64, [80, 120], 0.1)),
        (["dst/resnet50-imagenet"], (0.1, 0.9, 1e-4, 90, 1024, [30, 60, 80], 0.1)),
        (["dfbst/resnet18-cifar100"], (0.1, 0.9, 1e-4, 100, 64, [80], 0.1)),
        (["ggr/resnet18-cifar100", "ggr/mobilenetv2-cifar100"], (0.1, 0.9, 5e-4, 100, 128, [30, 60, 80], 0.2)),
        (["ggr/vgg16-tinyimagenet", "ggr/mobilenetv2-tinyimagenet"], (0.1, 0.9, 5e-4, 200, 128, [60, 120, 160], 0.2)),
        ([name for name in NETWORKS if "medst" in name], (0.1, 0.9, 1e-4, 200, 128, [80, 120], 0.1)),
        (
            ["autosparse/resnet50-imagenet", "autosparse/mobilenetv1-imagenet"],
            (0.256, 0.875, 2**-15, 100, 256, None, None),
        ),
    ],
)
def test_networks_are_trained_as_in_the_papers(names, expected):
    for name in names:
        recipe = read(name)
        optimizer = recipe["model"]["init_args"]["optimizer"]["init_args"]
        schedule = recipe["model"]["init_args"]["lr_scheduler"]["init_args"]
        trainer, batch = recipe["trainer"], recipe["data"]["init_args"]["batch_size"]
        assert (
            *(optimizer[key] for key in ("lr", "momentum", "weight_decay")),
            trainer["max_epochs"],
            batch * trainer.get("accumulate_grad_batches", 1),
            schedule.get("milestones"),
            schedule.get("gamma"),
        ) == expected


def test_methods_of_a_paper_share_its_schedule():
    for short in ("memory-efficient-dst", "set", "rigl"):
        _, settings = method_of(f"medst/{short}")
        assert (settings["drop_fraction"], settings["update_every"], settings["distribution"]) == (0.2, 1000, "uniform")
        assert settings["stop_at"] * read("medst/resnet56-cifar10")["trainer"]["max_epochs"] == 120
    for short in ("ggr", "ggr-set", "ggr-rigl", "set", "rigl", "dsr"):
        _, settings = method_of(f"ggr/{short}")
        assert (settings["drop_fraction"], settings["decay"], settings["stop_at"]) == (0.1, "cosine", 0.5)
        assert settings["update_every"] is None
    for name in METHODS:
        assert method_of(name)[1].get("sparsity", 0.8) in (0.8, 0.9, 0.95)


def test_powers_of_ten_are_numbers():
    """YAML reads 5e-6 as a text."""

    def walk(value):
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str):
            assert not re.fullmatch(r"-?[\d.]+e-?\d+", value), value

    for name in recipes.names():
        walk(read(name))


@pytest.mark.skipif(not DOCS.exists(), reason="docs are not installed")
def test_every_recipe_stands_in_the_documentation_and_nothing_else():
    text = DOCS.read_text()
    named = set(re.findall(r"`((?:[a-z0-9]+/)?[a-z0-9-]+)`", text))
    assert set(recipes.names()) <= named
    papers = {name.split("/")[0] for name in METHODS}
    assert {name for name in named if name.split("/")[0] in papers and "/" in name} <= set(recipes.names())


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(ValueError, match=r"no recipe is named 'dst-lenet30-mnist'. Near: dst-lenet300-mnist"):
        recipes.path("dst-lenet30-mnist")
