"""What ``lightning-sparse compare`` plans, and which requests it refuses."""

import re

import pytest
import yaml

import lightning_sparse
from lightning_sparse import cli
from lightning_sparse.compare import plan
from lightning_sparse.compare.recipe import Recipe

DIGITS = "dense-lenet300-digits"
OWN_DENSITY = {"DST", "DFBST", "AutoSparse", "STR", "FixedMask", "SRSTE", "SSTE"}


def own_recipe(folder, callbacks, **more):
    """Write a user's recipe, here of digits, with callbacks."""
    content = yaml.safe_load(lightning_sparse.zoo.recipes.path(DIGITS).read_text())
    content["trainer"]["callbacks"] = callbacks
    content.update(more)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def entries(methods, sparsities=None, recipe=DIGITS):
    return plan.entries(methods, sparsities, Recipe.read(recipe))


# ---------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("recipe", [DIGITS, "dense-lenet300-mnist"])
def test_every_method_of_the_package_is_known_and_planned_whatever_the_case(recipe):
    known = [name for name, kind in plan.methods().items() if name == kind.__name__]
    assert {"DFBST", "RigL", "GGR", "MemoryEfficientDST", *OWN_DENSITY} <= set(known)
    found = entries(",".join(["DENSE", *map(str.upper, known)]), [0.8, 0.9], recipe)
    assert [entry.method for entry in found] == ["dense"] + [n for n in known for _ in range(2 - (n in OWN_DENSITY))]
    for entry in found[1:]:
        own = entry.method in OWN_DENSITY
        assert entry.sparsity is None if own else entry.sparsity == entry.arguments["sparsity"]
        getattr(lightning_sparse, entry.method)(**entry.arguments)


def test_a_second_name_stands_for_the_same_method():
    assert [e.method for e in entries("gse")] == ["MemoryEfficientDST"]
    with pytest.raises(ValueError, match=r"MemoryEfficientDST at sparsity 0\.9 comes twice"):
        entries("gse,MemoryEfficientDST")


def test_hyphens_and_underscores_in_names_do_not_count():
    assert [e.method for e in entries("memory_efficient-dst,lottery-ticket")] == ["MemoryEfficientDST", "LotteryTicket"]


def test_arguments_are_yaml_and_brackets_protect_commas_and_colons():
    (entry, _) = entries("rigl:drop_fraction=2e-1:update_every=null:exclude=['fc3:w',fc1.weight],dense", [0.5])
    exclude = ["fc3:w", "fc1.weight"]
    assert entry.arguments == {"drop_fraction": 0.2, "update_every": None, "exclude": exclude, "sparsity": 0.5}
    assert entry.title == "RigL drop_fraction=0.2 update_every=None exclude=['fc3:w', 'fc1.weight']"


def test_arguments_that_are_not_written_come_from_the_methods_recipe_for_the_network():
    digits, mnist = (entries("dfbst:beta=0.5", recipe=f"dense-lenet300-{d}")[0] for d in ("digits", "mnist"))
    assert digits.arguments == {"alpha": 3e-3, "beta": 0.5}
    assert mnist.arguments == {"alpha": 5e-4, "beta": 0.5}


def test_what_the_methods_recipe_sets_beside_its_callback_is_told_with_the_way_to_have_it():
    said = []
    plan.entries("str", None, Recipe.read(DIGITS), said.append)
    key = "model.init_args.optimizer.init_args.weight_decay=0.01"
    assert said == [
        "STR: init_threshold=-5.0, as in the recipe str-lenet300-digits",
        f"STR: str-lenet300-digits also sets {key}, which is not taken over; to do so, add :{key}",
    ]
    (entry,) = plan.entries(f"str:{key}:init_threshold=-4", None, Recipe.read(DIGITS), said.append)
    assert (entry.options, len(said)) == ((key,), 2)


def test_sparsities_go_to_methods_that_take_one_and_were_given_none():
    found = entries("dst,set,rigl:sparsity=0.7", [0.8, 0.95])
    assert [(e.method, e.sparsity) for e in found] == [("DST", None), ("SET", 0.8), ("SET", 0.95), ("RigL", 0.7)]
    assert [e.sparsity for e in entries("set")] == [0.9]


def test_the_backward_density_of_topkast_is_twice_its_density_unless_given():
    assert [e.arguments["backward_sparsity"] for e in entries("topkast", [0.9, 0.3])] == [0.8, 0.0]
    assert entries("topkast:backward_sparsity=0.5")[0].arguments["backward_sparsity"] == 0.5


def test_the_recipes_sparse_callback_gives_its_arguments_to_its_method_and_its_choice_of_layers_to_all(tmp_path):
    rigl = {"class_path": "lightning_sparse.RigL", "init_args": {"sparsity": 0.6, "exclude": ["fc3.weight"]}}
    other = "lightning.pytorch.callbacks.LearningRateMonitor"
    recipe = Recipe.read(own_recipe(tmp_path, [{"class_path": other}, rigl]))
    assert (recipe.method, recipe.others) == ("RigL", [{"class_path": other}])
    dense, own, snip = plan.entries("dense,rigl,snip", None, recipe)
    assert dense.arguments == {}
    assert own.arguments == rigl["init_args"]
    assert snip.arguments == {"sparsity": 0.9, "exclude": ["fc3.weight"]}
    assert (own.title, snip.title) == ("RigL", "SNIP")


def test_a_callback_may_stand_alone_or_be_named_without_its_module(tmp_path):
    assert Recipe.read(own_recipe(tmp_path, {"class_path": "DST", "init_args": {"alpha": 1.0}})).method == "DST"
    assert Recipe.read(own_recipe(tmp_path, "LearningRateMonitor")).others == ["LearningRateMonitor"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "rigle"], "no method is named 'rigle'. Near: RigL"),
        (["--methods", "dense:alpha=1"], "dense takes no arguments, got alpha"),
        (["--methods", "dense,"], "no method is named ''"),
        (["--methods", "rigl:update_every"], "'update_every' is not ARGUMENT=VALUE. Write NAME or NAME:ARGUMENT=VALUE"),
        (["--methods", "rigl:decay=none:decay=cosine"], "gives decay twice"),
        (["--methods", "rigl:no_such=1"], "unexpected keyword argument 'no_such'"),
        (["--methods", "rigl:drop_fraction=2"], "drop_fraction must be"),
        (["--methods", "rigl:exclude=[a"], "is not a value in YAML"),
        (["--methods", "dst:sparsity=0.5:alpha=0.1"], "DST takes either alpha or sparsity"),
        (["--methods", "set", "--sparsities", "1.5"], "sparsity must be a number from 0 to 1, got 1.5"),
        (["--methods", "set", "--sparsities", "a"], "must be numbers separated by commas, got 'a'"),
        (["--methods", "set,set"], "SET at sparsity 0.9 comes twice"),
        (["--methods", "dense", "--recipe", "dense-lenet300-digit"], "no recipe is named 'dense-lenet300-digit'"),
        (["--methods", "dense", "--recipe", "medst/rigl"], "medst/rigl is not a training but adds to one"),
        (["--methods", "dense", "--recipe", "none.yaml"], "there is no file none.yaml"),
        (["--methods", "dense", "--seeds", "0"], "must be an integer of at least 1, got '0'"),
        (["--methods", "dense", "--seeds", "1,1"], "must be a number of seeds, or different seeds such as 0,5"),
        (["--methods", "dense", "--jobs", "none"], "must be an integer of at least 1, got 'none'"),
        (["--methods", "dense", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--methods", "dense", "--epoch=1"], "--epoch=1 is not an option of compare"),
        (["--methods", "dense", "--data.init_args.batch_size", "5"], "with the equals sign"),
        (["--methods", "dense", "--trainer.callbacks+=DST"], "callbacks+ is set by compare itself. Give --methods"),
        (["--methods", "dense", "--trainer.max_epochs=3"], "max_epochs is set by compare itself. Give --epochs"),
        (["--methods", "dense:trainer.logger=false"], "--trainer.logger is set by compare itself"),
        (["--recipe", DIGITS], "required: --methods"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--recipe", DIGITS, *args])
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_threshold_methods_meet_the_sparsities_where_no_recipe_says_what_drives_them_to_one(tmp_path):
    recipe = own_recipe(tmp_path, None)
    for name in ("dst", "dfbst", "str"):
        assert [entry.sparsity for entry in entries(name, [0.5, 0.8], recipe)] == [0.5, 0.8]
    assert entries("dst", recipe=recipe)[0].arguments == {"sparsity": 0.9}
    assert entries("dst:alpha=1e-3", recipe=recipe)[0].arguments == {"alpha": 1e-3}
    assert entries("str:init_threshold=-3", recipe=recipe)[0].arguments == {"init_threshold": -3}
    assert entries("autosparse", recipe=recipe)[0].arguments == {}


def test_a_sparsity_of_a_threshold_method_takes_the_place_of_what_its_recipe_has():
    dst, dfbst, autosparse, soft = entries(
        "dst:sparsity=0.5,dfbst:sparsity=0.5,autosparse:sparsity=0.5,str:sparsity=0.5"
    )
    assert (dst.title, dst.sparsity, dst.arguments) == ("DST", 0.5, {"sparsity": 0.5})
    assert dfbst.arguments == {"beta": 0.01, "sparsity": 0.5}
    assert "alpha" in autosparse.arguments
    assert soft.arguments == {"sparsity": 0.5}


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"class_path": "lightning_sparse.DST"}, {"class_path": "lightning_sparse.SET"}], "has 2 sparse callbacks"),
        ([{"class_path": "no_such_module.Callback"}], "'no_such_module.Callback' cannot be imported"),
    ],
)
def test_recipes_whose_callbacks_cannot_be_told_apart_are_refused(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message):
        Recipe.read(own_recipe(tmp_path, callbacks))


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("words", "is not the configuration")])
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(str(tmp_path / "bad.yaml"))


def compare(out, *args):
    return ["compare", "--recipe", DIGITS, "--out", str(out), "--trainer.accelerator=cpu", *args]
