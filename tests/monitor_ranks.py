"""A monitored training in two processes: test_monitor.py calls ``run_all`` in each, which the environment numbers."""

import os

import torch
from helpers import Lit, fit, seeded
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_sparse import RigL, SparsityMonitor


def run_all(folder):
    rank = int(os.environ["LOCAL_RANK"])
    monitor = SparsityMonitor(every_n_batches=4)
    strategy = DDPStrategy(process_group_backend="gloo")
    options = {"strategy": strategy, "devices": 2, "logger": CSVLogger(folder)}
    fit([monitor, RigL(0.8, update_every=5)], seeded(Lit), **options)
    state = monitor.state_dict()
    torch.save({"epochs": state["epochs"], "bits": state["explored"]["bits"]}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()  # without it gloo's threads now and then abort the exit
