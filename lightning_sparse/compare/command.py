"""The command ``lightning-sparse compare``."""

import argparse
import json
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lightning_sparse
from lightning_sparse.compare import figure, results
from lightning_sparse.compare.plan import SYNTAX, Entry, check_option, entries, folder_name, methods
from lightning_sparse.compare.recipe import Recipe
from lightning_sparse.compare.runs import Run, say, terminated_as_interrupted, train
from lightning_sparse.compat.extras import extra

__all__ = ["main"]

_DESCRIPTION = f"""Train several methods with one recipe, several seeds each; print one table and draw one plot.

  lightning-sparse compare --recipe dense-lenet300-digits --methods dense,dst,rigl,ggr:update_every=50 --seeds 3

Methods: {SYNTAX}, separated by commas:
{textwrap.fill(f"dense, {', '.join(methods())}.", 120)}
Upper and lower case are alike. Values are YAML; quote values with brackets or quotes for your shell. An argument with
a dot is an option of fit, only for this method (dst:model.init_args.optimizer.init_args.lr=0.05). Arguments that you do
not give come from the recipe, if it has this method, else from the method's own recipe of this package for the same
network and data. TopKAST's backward density is twice its density unless backward_sparsity is given.

Options --trainer.KEY=VALUE, --model.KEY=VALUE and --data.KEY=VALUE, such as --data.data_dir=DIR, go to every run.

Runs that have finished are kept: repeat the command to continue after an interruption, or to add methods, sparsities
and seeds. Each run is one lightning-sparse fit in a separate process; its folder holds log.txt, run.yaml and version_N.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Compare methods; return the exit status: 0, 1 if a run failed, 130 after an interruption.

    Args:
        args: of the command line; None: those of the process.

    Raises:
        SystemExit: the arguments are wrong.
        ModuleNotFoundError: a package of an extra is not installed.
    """
    args = list(sys.argv[2:] if args is None else args)
    parser = _parser()
    given, options = parser.parse_known_args(args)
    try:
        for option in options:
            check_option(option)
        recipe = Recipe.read(given.recipe)
        if given.epochs is not None and given.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {given.epochs}. Leave it out to train as the recipe.")
        out = (given.out or Path("runs") / f"compare-{recipe.name}").resolve()
        chosen = entries(given.methods, given.sparsities, recipe, say)
        runs = {
            (entry.key, seed): _run(entry, seed, recipe, given.epochs, out, options)
            for seed in given.seeds
            for entry in chosen
        }
        for module in ("jsonargparse", "docstring_parser"):
            extra(module, "cli")
        if not given.no_plot:
            extra("matplotlib", "report")
        for run in runs.values():
            if run.finished:
                results.measured(run.folder, results.history(run.folder), given.metric)
        _settle(out, {"recipe": recipe.text, "epochs": given.epochs, "options": options})
    except ValueError as error:
        parser.error(str(error))
    look = _look_for(given.metric)
    try:
        with terminated_as_interrupted():
            failed = train(list(runs.values()), given.jobs, given.threads, given.epochs or recipe.epochs, say, look)
    except KeyboardInterrupt:
        finished = sum(run.finished for run in runs.values())
        say(f"\nInterrupted: {finished} of {len(runs)} runs have finished and are kept in {out}.")
        say(f"Go on with: {_command(args)}")
        return 130
    try:
        rows = [_row(entry, given.seeds, runs, given.metric) for entry in chosen]
    except ValueError as error:
        raise SystemExit(f"lightning-sparse compare: {error}") from error
    plot = None if given.no_plot else given.plot or out / "pareto.png"
    count = len(given.seeds)
    _report(rows, given, out, plot, f"{recipe.name}, {f'mean of {count} seeds' if count > 1 else 'one seed'}", args)
    for run in failed:
        say(f"FAILED  {run.name}: see {run.log}{run.last_words}")
    return 1 if failed else 0


# ---------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-sparse compare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe of this package, or a YAML file")
    parser.add_argument("--methods", required=True, help="what to compare, separated by commas; see above")
    parser.add_argument(
        "--sparsities",
        type=_sparsities,
        help="for methods that take one, such as 0.9,0.95,0.98 (default: the recipe's, else 0.9); "
        "other methods find their density themselves and run once",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default="3", help="their number N, for 0 to N-1, or a list such as 0,5 (default: 3)"
    )
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads of each run (default: 1)")
    parser.add_argument("--metric", default="val_acc", help="the logged value to compare (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: runs/compare-RECIPE)")
    parser.add_argument("--plot", type=Path, help="PNG file; an SVG is put beside it (default: OUT/pareto.png)")
    parser.add_argument("--full", action="store_true", help="print all columns; table.md has them in any case")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing; matplotlib is then not needed")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    """Read a number of seeds, or a list.

    >>> _seeds("3"), _seeds("0,5"), _seeds("7,")
    ([0, 1, 2], [0, 5], [7])
    """
    if "," not in text:
        return list(range(_positive(text)))
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts) or not parts:
        raise argparse.ArgumentTypeError(f"must be a number of seeds, or different seeds such as 0,5, got {text!r}")
    return [int(part) for part in parts]


def _sparsities(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Note what all runs in the folder share, or refuse a folder of runs that share something else."""
    file = out / "comparison.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name in settings if settings[name] != before.get(name)]
        if other:
            raise ValueError(
                f"{out} holds runs with another setting of: {', '.join(other)} (see {file.name} there). "
                "Choose another folder with --out, or remove that one."
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- runs


def _run(entry: Entry, seed: int, recipe: Recipe, epochs: int | None, out: Path, options: Sequence[str]) -> Run:
    callbacks = list(recipe.others)
    if entry.method != "dense":
        callbacks.append({"class_path": f"lightning_sparse.{entry.method}", "init_args": entry.arguments})
    trainer: dict[str, Any] = {"callbacks": callbacks}
    if epochs is not None:
        trainer["max_epochs"] = epochs
    return Run(
        f"{entry.name}, seed {seed}",
        out / folder_name(entry.key) / f"seed{seed}",
        recipe.file,
        {"seed_everything": seed, "trainer": trainer},
        (*options, *(f"--{option}" for option in entry.options)),
    )


def _look_for(metric: str) -> Callable[[Run], None]:
    """Return what tells, of the first run to finish, that it has not logged the metric: no other run will."""
    looked: list[Run] = []

    def look(run: Run) -> None:
        if looked:
            return
        looked.append(run)
        try:
            results.measured(run.folder, results.history(run.folder), metric)
        except ValueError as error:
            say(f"NO METRIC  {error} The runs continue. For the table, repeat the command with one of these.")

    return look


def _row(entry: Entry, seeds: Sequence[int], runs: dict[tuple[str, int], Run], metric: str) -> results.Row:
    """Return the row of the entry's runs that have finished."""
    done = {seed: runs[entry.key, seed] for seed in seeds if runs[entry.key, seed].finished}
    found = {seed: results.numbers(run.folder, metric, entry.method, entry.sparsity) for seed, run in done.items()}
    return results.Row(entry.method, entry.title, entry.sparsity, found)


# ---------------------------------------------------------------------- what comes out


def _report(
    rows: Sequence[results.Row], given: argparse.Namespace, out: Path, plot: Path | None, title: str, args: list[str]
) -> None:
    """Print the table, with several sparsities a second one of these; write them, and the plot."""
    table = _tables(results.markdown(rows, given.metric), results.by_sparsity(rows, given.metric))
    caption = (
        f"Mean ± sample standard deviation over the seeds. {given.jobs} at a time, threads a run: {given.threads}. "
        f"lightning_sparse {lightning_sparse.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}."
    )
    print(f"{table if given.full else _narrow(rows, given.metric)}\n\n{textwrap.fill(caption, 100)}")
    for row in rows:
        if (updates := results.few_updates(row)) is not None:
            at = "" if row.sparsity is None else f" at sparsity {row.sparsity:g}"
            say(
                f"FEW UPDATES  {row.title}{at}: updates of connections: {updates}. The training is too short for its "
                "settings: train longer, or give the method a smaller update_every."
            )
    text = f"```\n{_command(args)}\n```\n\n{table}\n\n{caption}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    results.write_csv(rows, given.metric, out / "table.csv", out / "runs.csv")
    written = [out / "table.md", out / "table.csv", out / "runs.csv"]
    if plot is not None and any(row.runs for row in rows):
        pictures = [plot.with_suffix(".png"), plot.with_suffix(".svg")]
        figure.draw(rows, given.metric, title, pictures)
        written += pictures
    say(f"Written: {', '.join(map(str, written))}")


def _narrow(rows: Sequence[results.Row], metric: str) -> str:
    """Return what a terminal of 100 columns has room for."""
    short = results.shortened(rows)
    note = "FLOPs are theoretical, in % of dense training. --full and table.md have all columns."
    return _tables(results.narrow(short, metric), results.by_sparsity(short, metric), note)


def _tables(*tables: str) -> str:
    return "\n\n".join(filter(None, tables))


def _command(args: Sequence[str]) -> str:
    return shlex.join(["lightning-sparse", "compare", *args])
