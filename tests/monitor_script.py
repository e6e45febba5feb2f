"""Run by monitor/test_monitor.py in each of two processes: ``monitor_script.py DIRECTORY``."""

import os
import sys
from pathlib import Path

import torch
from helpers import Lit, fit, seeded
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_sparse import RigL, SparsityMonitor


def main(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    monitor = SparsityMonitor(every_n_batches=4)
    strategy = DDPStrategy(process_group_backend="gloo")
    options = {"strategy": strategy, "devices": 2, "logger": CSVLogger(folder)}
    fit([monitor, RigL(0.8, update_every=5)], seeded(Lit), **options)
    state = monitor.state_dict()
    torch.save({"epochs": state["epochs"], "bits": state["explored"]["bits"]}, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit


if __name__ == "__main__":
    main(sys.argv[1])
