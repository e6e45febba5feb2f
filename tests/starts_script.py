"""Print how accurate methods that begin sparse are in a short training, with starts scaled and not."""

import logging
import statistics
import warnings

import lightning.pytorch as pl
import torch

from lightning_sparse import (
    DSR,
    GGR,
    ITOP,
    MEST,
    SET,
    SNFS,
    SNIP,
    SWAT,
    DeepR,
    GraNet,
    GraSP,
    MemoryEfficientDST,
    RandomPruning,
    RigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.zoo.data import DigitsDataModule
from lightning_sparse.zoo.models import LeNet300

SEEDS = (0, 1, 2)
METHODS = (
    RandomPruning,
    SNIP,
    GraSP,
    SynFlow,
    SET,
    RigL,
    ITOP,
    MEST,
    SNFS,
    DSR,
    GGR,
    MemoryEfficientDST,
    DeepR,
    GraNet,
)


def accuracy(callbacks, seed):
    pl.seed_everything(seed, verbose=False)
    module = LeNet300(inputs=64)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=15, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet)
    trainer.fit(module, DigitsDataModule())
    return 100 * float(trainer.callback_metrics["val_acc"])


def shown(build):
    found = [accuracy(build(), seed) for seed in SEEDS]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def main():
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"dense {shown(list)}\n\n| method | as it is | scaled |\n|---|---|---|")
    builds = {method.__name__: lambda scale, method=method: [method(0.9, scale_init=scale)] for method in METHODS}
    builds["TopKAST"] = lambda scale: [TopKAST(0.9, 0.8, scale_init=scale)]
    builds["SWAT"] = lambda scale: [SWAT(0.9, scale_init=scale)]
    for name, build in builds.items():
        cells = [shown(lambda build=build, scale=scale: build(scale)) for scale in (False, True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
