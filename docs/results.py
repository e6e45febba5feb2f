"""Run recipes for several seeds and print one Markdown table: the commands behind ``docs/results.md``.

    python docs/results.py --data-dir DIR --seeds 0,1,2 --jobs 2 dense-lenet300-mnist dst-lenet300-mnist@alpha=2e-3

``NAME@ARGUMENT=VALUE`` sets an argument of the recipe's callback, ``NAME+METHOD`` adds a callback to the recipe. Each
run is one ``lightning-sparse fit`` in a process of its own with one thread; runs that have finished (in ``--out``) are
kept, so that the command can be repeated.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def folder(out: Path, recipe: str, seed: int) -> Path:
    """Name the folder of one run."""
    return out / recipe / f"seed{seed}"


def train(out: Path, data_dir: Path, recipe: str, seed: int, epochs: int | None = None) -> None:
    """Train once, unless that has been done."""
    where = folder(out, recipe, seed)
    if (where / "done").exists():
        return
    where.mkdir(parents=True, exist_ok=True)
    name, *settings = recipe.split("@")
    name, *methods = name.split("+")
    overrides = [f"--trainer.callbacks+=lightning_sparse.{method}" for method in methods]
    overrides += [f"--trainer.callbacks.init_args.{setting}" for setting in settings]
    if epochs is not None:
        overrides.append(f"--trainer.max_epochs={epochs}")
    own = [str(Path(sys.executable).with_name("lightning-sparse")), "fit", "--recipe", name]
    own += [f"--seed_everything={seed}", f"--data.init_args.data_dir={data_dir}", "--trainer.enable_progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.time()
    with open(where / "log.txt", "w") as log:
        subprocess.run([*own, *overrides], cwd=where, env=environment, stdout=log, stderr=log, check=True)
    (where / "done").write_text(f"{time.time() - start:.0f} s\n")
    print(f"{recipe} seed {seed}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)


def epochs(out: Path, recipe: str, seed: int) -> list[dict[str, float]]:
    """Return what a run logged in each epoch."""
    file = max((folder(out, recipe, seed) / "runs").glob("*/version_*/metrics.csv"))
    history: dict[str, dict[str, float]] = {}
    with open(file) as lines:
        for row in csv.DictReader(lines):
            epoch = history.setdefault(row["epoch"], {})
            epoch.update({key: float(value) for key, value in row.items() if value})
    return list(history.values())


def spread(values: list[float], scale: float = 100) -> str:
    """Return mean and sample standard deviation in percent."""
    mean = f"{scale * statistics.mean(values):.2f}"
    return f"{mean} ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--data-dir", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=Path("runs/results").resolve())
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(train, arguments.out, arguments.data_dir, r, s) for r in arguments.recipes for s in seeds]
        for job in jobs:
            job.result()
    print("| recipe | accuracy % | density % | backward density % | sparsest epoch: density % | accuracy % | seeds |")
    print("|---|---|---|---|---|---|---|")
    for recipe in arguments.recipes:
        done = [seed for seed in seeds if (folder(arguments.out, recipe, seed) / "done").exists()]
        runs = [epochs(arguments.out, recipe, seed) for seed in done]
        columns = [spread([run[-1]["val_acc"] for run in runs])]
        for key in ("sparsity/model", "sparsity/backward"):
            columns.append(spread([1 - run[-1][key] for run in runs]) if key in runs[0][-1] else "")
        if "sparsity/model" in runs[0][-1]:
            sparsest = [max(run, key=lambda epoch: epoch["sparsity/model"]) for run in runs]
            columns.append(spread([1 - epoch["sparsity/model"] for epoch in sparsest]))
            columns.append(spread([epoch["val_acc"] for epoch in sparsest]))
        else:
            columns += ["", ""]
        print(f"| {recipe} | {' | '.join(columns)} | {len(done)} |")


if __name__ == "__main__":
    main()
