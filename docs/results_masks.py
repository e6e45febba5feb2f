"""Train every method with a given sparsity on MNIST, several seeds each, and print one table and draw one plot.

    python docs/results_masks.py --data-dir DIR --network lenet300 --epochs 10 --seeds 0,1,2 --jobs 2 --plot FILE.png

The recipe is that of the dense network (``dense-lenet300-mnist``, ``dense-lenet5-mnist``) with the callback added;
dense, DST and DFBST run in the same way. As in ``results.py``, each run is one ``lightning-sparse fit`` in a process of
its own with one thread, and runs that have finished (in ``--out``) are kept, so that the command can be repeated.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import epochs, folder, spread, train

ACROSS = {"SNIP", "GraSP", "SynFlow", "GMP", "LotteryTicket", "OptG"}  # their scores settle the layers' densities
METHODS: dict[str, dict[str, Any]] = {
    "RandomPruning": {},
    "SET": {},
    "DeepR": {},
    "DSR": {},
    "SNFS": {},
    "RigL": {},
    "ITOP": {},
    "MEST": {},
    "GGR": {},
    "MemoryEfficientDST": {"update_every": 200, "heuristic": "grabo"},
    "TopKAST": {"backward_sparsity": lambda sparsity: round(1 - 2 * (1 - sparsity), 6), "update_every": 10},
    "SNIP": {},
    "GraSP": {},
    "SynFlow": {},
    "GraNet": {},
    "GMP": {},
    "LotteryTicket": {"rounds": 4},
    "OptG": {"update_every": 10},
    "SWAT": {"update_every": 10},
}
OWN_DENSITY = ["dense-{}-mnist", "dst-{}-mnist", "dfbst-{}-mnist"]


def run_name(network: str, method: str, sparsity: float, distribution: str | None) -> str:
    """Name a run as ``results.train`` understands it."""
    settings = {key: value(sparsity) if callable(value) else value for key, value in METHODS[method].items()}
    arguments = {"sparsity": sparsity, **settings}
    if distribution:
        arguments["distribution"] = distribution
    return f"dense-{network}-mnist+{method}" + "".join(f"@{key}={value}" for key, value in arguments.items())


def main() -> None:
    """Run what is missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=Path("runs/results-masks").resolve())
    parser.add_argument("--network", choices=["lenet300", "lenet5"], default="lenet300")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsities", default="0.9,0.95,0.98")
    parser.add_argument("--distributions", default="erk")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    sparsities = [float(sparsity) for sparsity in arguments.sparsities.split(",")]
    rows: dict[str, list[str]] = {
        name: [name] for name in (template.format(arguments.network) for template in OWN_DENSITY)
    }
    for method in arguments.methods.split(","):
        for distribution in [None] if method in ACROSS else arguments.distributions.split(","):
            title = f"{method} {distribution or ''}".strip()
            rows[title] = [run_name(arguments.network, method, s, distribution) for s in sparsities]
    names = list(dict.fromkeys(name for runs in rows.values() for name in runs))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(train, arguments.out, arguments.data_dir, name, seed, arguments.epochs)
            for seed in seeds
            for name in names
        ]
        failed = [job.exception() for job in jobs if job.exception()]
    for error in failed:
        print(f"failed: {error}")
    points = table(arguments.out, rows, sparsities, seeds)
    if arguments.plot:
        plot(points, arguments.network, arguments.plot)


def table(
    out: Path, rows: dict[str, list[str]], sparsities: list[float], seeds: list[int]
) -> dict[str, list[tuple[float, float]]]:
    """Print accuracies by method and sparsity; return (density, accuracy) of each method for the plot."""
    print(f"| method | {' | '.join(f'sparsity {s:g}: accuracy %' for s in sparsities)} | seeds |")
    print("|---|" + "---|" * (len(sparsities) + 1))
    points: dict[str, list[tuple[float, float]]] = {}
    for title, names in rows.items():
        cells, counts = [], set()
        for name in names:
            done = [seed for seed in seeds if (folder(out, name, seed) / "done").exists()]
            counts.add(len(done))
            if not done:
                cells.append("")
                continue
            last = [epochs(out, name, seed)[-1] for seed in done]
            accuracy = [epoch["val_acc"] for epoch in last]
            density = [1 - epoch.get("sparsity/model", 0.0) for epoch in last]
            cells.append(spread(accuracy))
            if len(names) == 1:
                cells[-1] += f" at density {spread(density)} %"
            points.setdefault(title, []).append((100 * statistics.mean(density), 100 * statistics.mean(accuracy)))
        cells += [""] * (len(sparsities) - len(cells))
        print(f"| {title} | {' | '.join(cells)} | {' / '.join(map(str, sorted(counts)))} |")
    return points


def plot(points: dict[str, list[tuple[float, float]]], network: str, path: Path) -> None:
    """Draw accuracy over density."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    styles = ["o-", "s--", "^-.", "v:", "D-", "P--", "X-."]
    for index, (title, values) in enumerate(points.items()):
        if title.startswith("dense"):
            axes.axhline(values[0][1], color="gray", linestyle=":", label=title)
            continue
        x, y = zip(*sorted(values), strict=True)
        axes.plot(x, y, styles[index % len(styles)], color=plt.get_cmap("tab20")(index % 20), label=title, markersize=5)
    axes.set(xscale="log", xlabel="density of the selected weights, %", ylabel="accuracy, %", title=f"MNIST, {network}")
    axes.set_xticks([2, 5, 10], ["2", "5", "10"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
