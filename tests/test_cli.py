import csv
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from processes import PATIENCE, environment

import lightning_sparse
from lightning_sparse import DST, RigL, SparsityMonitor, cli
from lightning_sparse.compare import demo, plan
from lightning_sparse.zoo import recipes
from lightning_sparse.zoo.models import LeNet300

SHORT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sparse"])
    return tmp_path


def test_a_run_leaves_config_metrics_and_checkpoint_behind(elsewhere):
    cli.main(["fit", "--recipe", "dfbst-lenet300-digits", *SHORT])
    run = elsewhere / "runs" / "dfbst-lenet300-digits" / "version_0"
    assert (run / "config.yaml").is_file()
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {"val_acc", "val_loss", "train_loss", "sparsity/model", "sparsity/backward"} <= set(rows[0])
    found = json.loads((run / "sparsity.json").read_text())
    assert (found["method"]["name"], found["seed"], len(found["epochs"])) == ("DFBST", 0, 1)
    assert float(rows[-1]["sparsity/model"]) == pytest.approx(1 - found["epochs"][0]["density"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 23
    assert "fc1.weight" in checkpoint["state_dict"]


def test_a_run_that_breaks_off_goes_on_from_its_last_epoch(elsewhere, monkeypatch):
    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")

    fit = ["fit", "--recipe", "dfbst-lenet300-digits", *SHORT[1:], "--trainer.max_epochs=3"]
    whole = cli.run(fit)
    with monkeypatch.context() as patch:
        patch.setattr(LeNet300, "on_train_epoch_start", on_train_epoch_start)
        with pytest.raises(RuntimeError, match="power cut"):
            cli.run(fit)
    folder = elsewhere / "runs" / "dfbst-lenet300-digits" / "version_1" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 46
    resumed = cli.run([*fit, f"--ckpt_path={folder / 'last.ckpt'}"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_options_after_a_recipe_override_it():
    fit = cli.run(
        ["fit", "--recipe=dst-lenet300-digits", *SHORT, "--seed_everything=5", "--data.init_args.batch_size=700"]
    )
    assert fit.trainer.global_step == 3
    assert fit.config.fit.seed_everything == 5


def test_a_users_own_file_trains_and_names_the_run(elsewhere):
    text = recipes.path("dst-lenet300-digits").read_text().replace("3.0e-3", "0.125")
    (elsewhere / "mine.yaml").write_text(text)
    fit = cli.run(["fit", "-c", "mine.yaml", *SHORT])
    (method,) = (c for c in fit.trainer.callbacks if isinstance(c, DST))
    assert method.alpha == 0.125
    assert (elsewhere / "runs" / "mine" / "version_0").is_dir()


def test_a_second_run_leaves_the_first_alone(elsewhere):
    for _ in range(2):
        cli.run(["fit", "--recipe", "dense-lenet300-digits", *SHORT])
    assert len(list(elsewhere.glob("runs/dense-lenet300-digits/version_[01]/checkpoints/last.ckpt"))) == 2


def test_runs_without_a_logger_write_no_configuration_that_a_second_one_would_stumble_over(elsewhere):
    for _ in range(2):
        fit = ["fit", "--recipe", "dense-lenet300-digits", *SHORT, "--trainer.logger=false"]
        cli.run([*fit, "--trainer.enable_checkpointing=false"])
    assert not list(elsewhere.iterdir())


def test_arguments_of_the_command_line_are_not_warned_of(monkeypatch, recwarn):
    args = ["fit", "--recipe", "dense-lenet300-digits", *SHORT, "--trainer.logger=false", "--trainer.fast_dev_run=true"]
    monkeypatch.setattr(sys, "argv", ["lightning-sparse", *args])
    cli.main()
    assert not [warning for warning in recwarn if "args" in str(warning.message)]


def test_a_run_is_resumed_validated_tested_and_predicted(elsewhere, capsys, recwarn):
    cli.run(["fit", "--recipe", "dst-lenet300-digits", *SHORT])
    (path,) = elsewhere.glob("runs/*/version_0/checkpoints/last.ckpt")
    recipe = ["--recipe", "dst-lenet300-digits", f"--ckpt_path={path}", *SHORT[1:]]
    resumed = cli.run(["fit", *recipe, "--trainer.max_epochs=2"])
    assert resumed.trainer.global_step == 46
    loaded = LeNet300.load_from_checkpoint(path)
    recwarn.clear()
    for command in ("validate", "test", "predict"):
        done = cli.run([command, *recipe])
        assert torch.equal(done.model.fc1.weight, loaded.fc1.weight)
    told = [str(warning.message) for warning in recwarn]
    assert not [text for text in told if "ckpt_path" in text or "dirpath" in text], "they are of a fit"
    assert not (elsewhere / "lightning_logs").exists()
    assert "test_acc" in capsys.readouterr().out


def test_a_users_logger_and_checkpoints_replace_the_defaults(elsewhere):
    options = [
        "--trainer.logger=false",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.init_args.dirpath=here",
    ]
    fit = cli.run(["fit", "--recipe", "dense-lenet300-digits", *SHORT, *options])
    assert fit.trainer.loggers == []
    assert len(fit.trainer.checkpoint_callbacks) == 1
    assert not (elsewhere / "runs").exists()


def test_a_users_monitor_replaces_the_default(elsewhere):
    monitor = ["--trainer.callbacks+=lightning_sparse.SparsityMonitor", "--trainer.callbacks.init_args.flops=false"]
    fit = cli.run(["fit", "--recipe", "dense-lenet300-digits", *SHORT, *monitor])
    (monitor,) = (callback for callback in fit.trainer.callbacks if isinstance(callback, SparsityMonitor))
    assert monitor.flops is False


def test_checkpoints_can_be_switched_off(elsewhere):
    cli.run(["fit", "--recipe", "dense-lenet300-digits", *SHORT, "--trainer.enable_checkpointing=false"])
    assert not list(elsewhere.rglob("*.ckpt"))


def test_recipes_are_listed_with_what_they_are(capsys):
    cli.main(["recipes"])
    titles, lines = [], {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            name, text = line.split(maxsplit=1)
            lines[name] = text
        else:
            titles.append((line.split(":")[0], len(lines)))
    trainings = sum(not recipes.is_add_on(name) for name in recipes.names())
    assert titles == [("Trainings", 0), ("Add-ons", trainings)]
    assert sorted(lines) == recipes.names()
    assert "ICLR 2020" in lines["dst-lenet300-mnist"]


def test_a_recipe_is_printed_by_name(capsys):
    cli.main(["recipes", "medst/rigl"])
    assert capsys.readouterr().out == recipes.path("medst/rigl").read_text()


def test_what_recipes_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit, match=r"lightning-sparse: no recipe is named 'rigl'\. Near: ggr/rigl"):
        cli.main(["recipes", "rigl"])
    for wrong in (["medst/rigl", "more"], ["--methods"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["recipes", *wrong])
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_a_method_is_added_to_a_training(elsewhere):
    options = ["--trainer.callbacks.sparsity=0.8", "--trainer.callbacks.update_every=5"]
    fit = cli.run(["fit", "--recipe", "dense-lenet300-digits", "--recipe", "medst/rigl", *SHORT, *options])
    (method,) = (c for c in fit.trainer.callbacks if isinstance(c, RigL))
    assert method.sparsity == pytest.approx(0.8)
    assert (method.update_every, method.drop_fraction) == (5, 0.2)
    assert (elsewhere / "runs" / "dense-lenet300-digits+rigl" / "version_0").is_dir()


def test_a_method_is_added_to_a_users_own_file(elsewhere):
    (elsewhere / "mine.yaml").write_text(recipes.path("dense-lenet300-digits").read_text())
    fit = cli.run(["fit", "-c", "mine.yaml", "--recipe", "dst/dst", *SHORT])
    assert any(isinstance(c, DST) for c in fit.trainer.callbacks)
    assert (elsewhere / "runs" / "mine+dst").is_dir()


@pytest.mark.parametrize("method", [name for name, kind in plan.methods().items() if name == kind.__name__])
def test_the_command_line_knows_what_each_method_takes(method, capsys):
    given = {"exclude": ["fc3.weight"], "min_layer_density": 0.01, "seed": 3, "log_every_n_steps": 7}
    taken = set(inspect.signature(plan.methods()[method]).parameters)
    given = {name: value for name, value in given.items() if name in taken}
    assert "exclude" in given
    own = inspect.signature(plan.methods()[method]).parameters.values()
    given |= {p.name: 0.5 for p in own if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    options = [f"--trainer.callbacks.{name}={json.dumps(value)}" for name, value in given.items()]
    add = f"--trainer.callbacks+={method}"
    with pytest.raises(SystemExit) as end:
        cli.run(["fit", "--recipe", "dense-lenet300-digits", add, *options, "--print_config"])
    assert end.value.code == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert {name: callback["init_args"][name] for name in given} == given


def test_an_addition_by_itself_is_refused():
    with pytest.raises(SystemExit, match="medst/rigl adds to a training: name one before it"):
        cli.main(["fit", "--recipe", "medst/rigl"])


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for word in ("recipes", "demo", "compare", "--recipe NAME", "fit", "validate", "test", "predict"):
        assert word in text


@pytest.mark.parametrize("args", [["--recipe", "dfbst-lenet300-minst"], ["--recipe=dfbst-lenet300-minst"]])
def test_an_unknown_recipe_lists_near_names(args):
    with pytest.raises(SystemExit, match=r"no recipe is named 'dfbst-lenet300-minst'. Near: dfbst-lenet300-mnist"):
        cli.main(["fit", *args])


def test_an_option_without_its_value_is_refused():
    with pytest.raises(SystemExit, match="--recipe needs a value"):
        cli.main(["fit", "--recipe"])


def test_missing_data_are_named_without_a_traceback():
    with pytest.raises(SystemExit, match=r"lightning-sparse: MNIST is not whole in .*gunzip"):
        cli.main(["fit", "--recipe", "dst-lenet300-mnist", "--data.init_args.data_dir=nowhere", *SHORT])


@pytest.mark.parametrize("package", ["jsonargparse", "docstring_parser"])
def test_a_missing_package_names_its_extras(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        SystemExit, match=rf"{package} is not installed: pip install 'lightning-sparse\[cli,examples\]'"
    ):
        cli.main(["fit", "--recipe", "dst-lenet300-digits"])


def test_demo_hands_its_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "main", seen.append)
    cli.main(["demo", "--epochs", "3"])
    assert seen == [["--epochs", "3"]]


def test_help_and_version_are_the_packages_own(capsys):
    for args in ([], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(args)
        assert "lightning-sparse compare --recipe NAME" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lightning-sparse {lightning_sparse.__version__}\n"


def test_the_end_of_a_fit_says_density_and_folder(capsys):
    cli.main(["fit", "--recipe", "dense-lenet300-digits", *SHORT, "--trainer.callbacks+=lightning_sparse.RandomPruning",
              "--trainer.callbacks.sparsity=0.75"])  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "RandomPruning: density 25.00%"
    folder = os.path.join("runs", "dense-lenet300-digits", "version_0")
    assert last[1] == f"Written to {folder}. A page on it: lightning-sparse report {folder}"


def test_a_module_of_the_working_directory_can_be_named(elsewhere, capsys, monkeypatch):
    (elsewhere / "my_network.py").write_text(
        "from lightning_sparse.zoo.models import LeNet300\n\n\nclass Net(LeNet300):\n    pass\n"
    )
    text = (
        recipes.path("dense-lenet300-digits")
        .read_text()
        .replace("lightning_sparse.zoo.models.LeNet300", "my_network.Net")
    )
    (elsewhere / "mine.yaml").write_text(text)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    cli.main(["fit", "-c", "mine.yaml", *SHORT, "--trainer.limit_train_batches=2"])
    assert "Written to" in capsys.readouterr().out


def test_what_cannot_be_trained_is_told_in_a_line():
    fit = ["fit", "--recipe", "dst-lenet300-digits", *SHORT, "--trainer.callbacks.exclude=['fc9*']"]
    with pytest.raises(SystemExit, match=r"lightning-sparse: .*fc9"):
        cli.main(fit)


@pytest.mark.parametrize(("command", "near"), [("bench", ""), ("reprot", "Did you mean 'report'? ")])
def test_an_unknown_command_is_answered_with_all_there_are(command, near):
    message = rf"must be one of fit, .*, recipes, demo, compare, report, got '{command}'\. {re.escape(near)}light"
    with pytest.raises(SystemExit, match=message):
        cli.main([command])


def test_a_binary_file_of_options_is_told_in_a_line(elsewhere):
    (elsewhere / "own.yaml").write_bytes(b"\xd8\x00\xff")
    for args in (["fit", "-c", "own.yaml"], ["fit", "--recipe", "dst-lenet300-digits", "--config=own.yaml"]):
        with pytest.raises(SystemExit, match=r"--config must be a YAML file, got own\.yaml, which is not text"):
            cli.main(args)


def test_who_reads_a_list_may_stop_before_its_end():
    read, write = os.pipe()
    os.close(read)  # as head does when it has its lines
    command = [sys.executable, "-c", "from lightning_sparse import cli; cli.main(['recipes'])"]
    with os.fdopen(write, "w") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=environment(), timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (1, b"")
