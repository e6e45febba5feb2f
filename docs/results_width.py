"""Train wider and sparser networks with the same number of weights on MNIST: accuracy and peak memory, one table.

    python docs/results_width.py --data-dir DIR --network mlp --epochs 5 --seeds 0,1,2 --jobs 2

At width 1 the network is dense; at width w its hidden layers are w times as wide and ``MemoryEfficientDST`` with sparse
storage keeps as many weights as the dense network of width 1 has (Table 2 of the memory-efficient DST paper, which
could count but not measure memory). Each run is a process of its own with one thread. Peak memory is that of the
process during training, without what it takes before the network is made, with the data and all libraries loaded; the
last column is a few steps of the dense network of the same width. Finished runs (in ``--out``) are kept. Linux only.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WIDTHS = (1.0, 1.5, 2.0, 3.0, 4.0)


def network(kind: str, width: float) -> Any:
    """Make the network: an MLP with hidden layers of 512, or two convolutions of 8 and 16 filters and 64 neurons."""
    import torch
    from torch import nn

    from lightning_sparse.zoo.models.classifier import Classifier

    def wide(units: int) -> int:
        return round(width * units)

    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, wide(512)), nn.ReLU(), nn.Linear(wide(512), wide(512)), nn.ReLU()]
        layers += [nn.Linear(wide(512), 10)]
    else:
        layers = [nn.Conv2d(1, wide(8), 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(wide(8), wide(16), 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Linear(49 * wide(16), wide(64)), nn.ReLU(), nn.Linear(wide(64), 10)]

    class Wide(Classifier):
        def __init__(self) -> None:
            super().__init__(10)
            self.layers = nn.Sequential(*layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    return Wide()


def weights(kind: str, width: float) -> int:
    """Count the weights of the dense network, without biases."""
    import torch

    with torch.device("meta"):
        module = network(kind, width)
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def run(kind: str, width: float, sparse: bool, seed: int, epochs: int, data_dir: str) -> None:
    """Train once in this process; print what came of it as JSON."""
    from lightning_sparse import MemoryEfficientDST
    from lightning_sparse.accounting.memory import peak_memory, resident_memory
    from lightning_sparse.compat.lightning import Trainer
    from lightning_sparse.zoo.data import MNISTDataModule

    def trainer(callbacks: list[Any], **options: Any) -> Any:
        return Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=0, **options,
        )  # fmt: skip

    from lightning import seed_everything

    seed_everything(seed)
    data = MNISTDataModule(data_dir, batch_size=128, eval_batch_size=128)
    data.setup("fit")
    batches = data.train_dataloader(), data.val_dataloader()
    sparsity = 1 - weights(kind, 1.0) / weights(kind, width)
    first = [MemoryEfficientDST(sparsity=0.5, storage="sparse", update_every=1)] if sparse else []
    trainer(first, max_steps=4, limit_val_batches=1).fit(network(kind, 1.0), *batches)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_memory()
    module = network(kind, width)
    callbacks = [MemoryEfficientDST(sparsity, storage="sparse", update_every=100, heuristic="grabo")] if sparse else []
    start = time.perf_counter()
    limits = {"max_epochs": epochs} if epochs else {"max_steps": 20, "limit_val_batches": 2}
    run = trainer(callbacks, **limits)
    run.fit(module, *batches)
    print(json.dumps({
        "accuracy": float(run.callback_metrics.get("val_acc", math.nan)), "peak": peak_memory() - before,
        "sparsity": sparsity, "seconds": time.perf_counter() - start,
    }))  # fmt: skip


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=lambda text: str(Path(text).resolve()), required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/results-width"))
    parser.add_argument("--network", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(*json.loads(arguments.run), arguments.data_dir)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)

    def measured(width: float, sparse: bool, seed: int, epochs: int) -> dict[str, float]:
        file = arguments.out / f"{arguments.network}-{width}-{'sparse' if sparse else 'dense'}-{seed}-{epochs}.json"
        if not file.exists():
            task = json.dumps([arguments.network, width, sparse, seed, epochs])
            own = [sys.executable, __file__, "--data-dir", arguments.data_dir, "--run", task]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            file.write_text(output.splitlines()[-1])
        result: dict[str, float] = json.loads(file.read_text())
        return result

    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = {w: [pool.submit(measured, w, w > 1, seed, arguments.epochs) for seed in seeds] for w in WIDTHS}
        dense = {w: pool.submit(measured, w, False, 0, 0) for w in WIDTHS}
    print("| width | weights, dense | sparsity % | weights kept | accuracy % | peak MB | dense peak MB |")
    print("|---|---|---|---|---|---|---|")
    kept = weights(arguments.network, 1.0)
    for width in WIDTHS:
        runs = [job.result() for job in rows[width]]
        accuracy = [100 * run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
        print(
            f"| {width:g} | {weights(arguments.network, width):,} | {100 * runs[0]['sparsity']:.1f} | {kept:,} | "
            f"{statistics.mean(accuracy):.2f}{spread} | {statistics.median(run['peak'] for run in runs) / 1e6:.0f} | "
            f"{dense[width].result()['peak'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
