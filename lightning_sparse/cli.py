"""The command ``lightning-sparse``, on LightningCLI: fit, validate, test, predict; recipes, demo, compare, report."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning_sparse
from lightning_sparse import completion
from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import PACKAGE, LightningModule, MisconfigurationException, Trainer
from lightning_sparse.compat.lightning_private import KeepsConfiguredModel, configured
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.monitor.csv_log import EpochCSVLogger
from lightning_sparse.monitor.run_file import FILE
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.zoo import recipes

__all__ = ["main"]

_EXTRAS = "cli,examples"
_COMMANDS = ("fit", "validate", "test", "predict", "recipes", "demo", "compare", "report")

_HELP = """Sparse training from the command line.

  lightning-sparse recipes [NAME]                              list the recipes of this package, or print one
  lightning-sparse fit --recipe NAME [...]                     train one
  lightning-sparse fit --recipe NAME --recipe ADD_ON [...]     train one with a method added
  lightning-sparse fit -c FILE.yaml [...]                      train your own
  lightning-sparse demo [...]                                  train DFBST and its dense baseline, and compare
  lightning-sparse compare --recipe NAME --methods A,B [...]   train methods, several seeds each: one table, one plot
  lightning-sparse report RUN_DIR [--dense DIR]                write a page on a run, beside its dense baseline

lightning-sparse --completion bash (or zsh) prints a script for your shell, which then completes names with the Tab key.
--recipe NAME stands for --config with a file of this package. What follows it overrides it, for example
--data.data_dir=DIR, --trainer.callbacks.sparsity=0.95 (of the method), --trainer.max_epochs=5 or --seed_everything=1.
lightning-sparse fit --help lists all options; validate, test and predict take the same, and --ckpt_path.
A run goes to runs/NAME/version_N: config.yaml, metrics.csv, sparsity.json and checkpoints/last.ckpt.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with the arguments given, by default those of the process."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who read has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python's last flush fail
        raise SystemExit(1) from None


def _run(args: list[str]) -> None:
    """Run the command that is named first."""
    try:
        if args in ([], ["-h"], ["--help"]):
            print(_HELP)
            raise SystemExit(0)
        elif args == ["--version"]:
            print(f"lightning-sparse {lightning_sparse.__version__}")
        elif args[:1] == ["--completion"]:
            print(completion.script("".join(args[1:]), _COMMANDS), end="")
        elif args[:1] == ["recipes"]:
            _recipes(args[1:])
        elif args[:1] == ["demo"]:
            from lightning_sparse.compare import demo

            demo.main(args[1:])
        elif args[:1] == ["compare"]:
            from lightning_sparse import compare

            raise SystemExit(compare.main(args[1:]))
        elif args[:1] == ["report"]:
            from lightning_sparse import report

            report.main(args[1:])
        else:
            _refuse_unknown(args)
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())  # for class_path: mymodel.Net
            _tell(run(args))
    except (ModuleNotFoundError, FileNotFoundError, MisconfigurationException, ValueError) as error:
        if isinstance(error, ValueError) and not _ours(error):
            raise
        raise SystemExit(f"lightning-sparse: {error}") from error


def _refuse_unknown(args: Sequence[str]) -> None:
    """Raise if the first argument is a word, but no command."""
    if args[0] not in _COMMANDS and not args[0].startswith("-"):
        near = "".join(f"Did you mean {name!r}? " for name in get_close_matches(args[0], _COMMANDS, n=1))
        raise ValueError(
            f"the command must be one of {', '.join(_COMMANDS)}, got {args[0]!r}. {near}lightning-sparse --help says "
            "what they do."
        )


def _ours(error: Exception) -> bool:
    """Tell whether this package has raised ``error``, whose message says what to do: nobody needs where it was."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.startswith("lightning_sparse.")


def _tell(cli: Any) -> None:
    """Say what came of a fit, and where it is."""
    if cli.subcommand != "fit":
        return
    # all processes count together
    found = [(type(each).__name__, each.density) for each in cli.trainer.callbacks if isinstance(each, SparseCallback)]
    if not cli.trainer.is_global_zero:
        return
    for name, density in found:
        print(f"{name}: density {density:.2%}")
    folder = cli.trainer.log_dir
    if cli.trainer.loggers and folder:
        page = f" A page on it: lightning-sparse report {folder}" if Path(folder, FILE).is_file() else ""
        print(f"Written to {folder}.{page}")


def run(args: Sequence[str]) -> Any:
    """Run fit, validate, test or predict, and return the LightningCLI object.

    Raises:
        SystemExit: the arguments are wrong.
        ModuleNotFoundError: LightningCLI's requirements are not installed.
    """
    extra("jsonargparse", _EXTRAS)
    extra("docstring_parser", _EXTRAS)  # of jsonargparse[signatures]
    try:
        name, args = _expand(args)
    except ValueError as error:
        raise SystemExit(f"lightning-sparse: {error}") from error
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")  # data in memory need none
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # ours are those of the command line
    return _cli_class(args[0] if args else "")(
        name,
        LightningModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        load_from_checkpoint_support=False,  # it would tie the loading of checkpoints to jsonargparse
        parser_kwargs={"description": _HELP},
        seed_everything_default=0,
        args=list(args),
    )


def _expand(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Replace ``--recipe NAME`` by ``--config FILE``; return a name for the run as well."""
    name: str | None = None
    expanded: list[str] = []
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option not in ("--recipe", "--config", "-c"):
            expanded.append(arg)
            continue
        if not equals:
            value = next(rest, "")
        if not value:
            raise ValueError(f"{option} needs a value.")
        if option == "--recipe":
            file = recipes.path(value)
            if not recipes.is_add_on(value):
                name = name or value.replace("/", "-")
            elif name is None:
                raise ValueError(f"{value} adds to a training: name one before it (see lightning-sparse recipes).")
            else:
                name += f"+{file.stem}"
            value = str(file)
        _refuse_binary(value)
        name = name or Path(value).stem
        expanded += ["--config", value]
    return name, expanded


def _refuse_binary(file: str) -> None:
    """Raise if a file of options is no text; what else is wrong with it, its parser says."""
    try:
        Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config must be a YAML file, got {file}, which is not text ({error}).") from error
    except OSError:
        return


def _recipes(args: Sequence[str]) -> None:
    """Print the recipe that is named, to start one's own from; without a name, list them all."""
    parser = argparse.ArgumentParser(
        prog="lightning-sparse recipes", description="List the recipes of this package, or print one."
    )
    parser.add_argument("name", nargs="?", help="print this one, to start your own from; default: list all")
    name = parser.parse_args(args).name
    if name is None:
        _list_recipes()
    else:
        print(recipes.path(name).read_text(encoding="utf-8"), end="")


def _list_recipes() -> None:
    trainings = [name for name in recipes.names() if not recipes.is_add_on(name)]
    add_ons = [name for name in recipes.names() if recipes.is_add_on(name)]
    width = max(map(len, recipes.names()))
    for title, some in (
        ("Trainings: lightning-sparse fit --recipe TRAINING", trainings),
        ("Add-ons: lightning-sparse fit --recipe TRAINING --recipe ADD_ON", add_ons),
    ):
        print(title)
        for name in some:
            print(f"  {name:{width}}  {recipes.summary(name)}")


def _cli_class(command: str) -> Any:
    """Return the subclass of LightningCLI for a command; a function, since its base needs packages of an extra."""
    LightningCLI = import_module(f"{PACKAGE}.cli").LightningCLI
    ModelCheckpoint = import_module(f"{PACKAGE}.callbacks").ModelCheckpoint

    class SparseCLI(KeepsConfiguredModel, LightningCLI):  # type: ignore[misc, valid-type]  # found at run time
        def __init__(self, name: str | None, *args: Any, **kwargs: Any) -> None:
            self.run_name = name
            super().__init__(*args, **kwargs)

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """Return those that get a parser: the one that is asked for, as each takes a while to make."""
            known: dict[str, set[str]] = LightningCLI.subcommands()
            return {command: known[command]} if command in known else known

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """Add what runs have by default: a CSV log, a last checkpoint and a monitor, in runs/NAME."""
            given = configured(self, "trainer")
            if self.subcommand != "fit" or given.logger is False:
                self.save_config_callback = None  # it would make a directory of logs, or write where the command runs
            if given.logger is None:
                log = EpochCSVLogger("runs", name=self.run_name or type(self.model).__name__)
                kwargs["logger"] = log if self.subcommand == "fit" else False
            callbacks = given.callbacks or []
            callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
            fitting = self.subcommand == "fit"
            if not fitting:  # of states in the checkpoint that fits alone have use for: the monitor's, its folder's
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`|The dirpath has changed")
            kept = given.enable_checkpointing is False or any(isinstance(c, ModelCheckpoint) for c in callbacks)
            if fitting and not kept:
                # the latest alone: save_last with save_top_k=0 would write at the end of the fit only
                last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
                callbacks.append(last)
            watched = any(isinstance(callback, SparsityMonitor) for callback in callbacks)
            if fitting and given.logger is not False and not watched:
                callbacks.append(SparsityMonitor())  # which writes sparsity.json
            kwargs["callbacks"] = callbacks
            trainer: Trainer = super().instantiate_trainer(**kwargs)
            return trainer

    return SparseCLI
