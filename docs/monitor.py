"""Train LeNet-300-100 on scikit-learn's digits with DST and draw ``docs/monitor.png`` from the run's sparsity.json.

python docs/monitor.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from lightning_sparse import cli


def main() -> None:
    """Train and draw."""
    with TemporaryDirectory() as folder:
        options = ["--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger"]
        options += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
        cli.run(["fit", "--recipe", "dst-lenet300-digits", *options])
        (file,) = Path(folder).rglob("sparsity.json")
        run = json.loads(file.read_text(encoding="utf-8"))
    epochs = run["epochs"]
    x = [epoch["epoch"] + 1 for epoch in epochs]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    density, flops, life, mask = figure.subplots(1, 4)
    for name in epochs[0]["layers"]:
        density.plot(x, [epoch["layers"][name]["density"] for epoch in epochs], label=name)
    density.set(title="density", xlabel="epoch", ylim=0)
    for key in ("inference_flops", "training_flops"):
        flops.plot(x, [epoch[key] for epoch in epochs], label=key)
    flops.set(title="operations / dense (theoretical)", xlabel="epoch", ylim=0)
    for key in ("churn", "exploration"):
        life.plot(x, [epoch[key] for epoch in epochs], label=key)
    life.set(title="life of the masks", xlabel="epoch", ylim=0)
    for axes in (density, flops, life):
        axes.legend(fontsize=8)
    name, picture = next(iter(run["masks"].items()))
    extent = (0, picture["columns"], picture["rows"], 0)
    mask.imshow(picture["density"], cmap="Greys", vmin=0, vmax=1, aspect="auto", extent=extent)
    mask.set(title=f"mask of {name}", xlabel="inputs", ylabel="neurons")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
